"""Graphs that were traced in training train: gradients, statistics, the counter and its ramps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from triton_brn import BatchRenorm2d, Ramp
from triton_brn.ops import OPS

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::torch.jit.TracerWarning")


def network() -> nn.Module:
    """Whose layer meets its ramps, and clips."""
    norm = BatchRenorm2d(4, momentum=0.3, r_max=Ramp(1.0, 1.5, 1, 3), d_max=Ramp(0.0, 0.5, 0, 4))
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Tanh())


def exported(strict: bool, decomposed: bool = False) -> Callable[[nn.Module, Tensor], nn.Module]:
    def export(module: nn.Module, x: Tensor) -> nn.Module:
        program = torch.export.export(module, (x,), strict=strict)
        return (program.run_decompositions() if decomposed else program).module()

    return export


TRACERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "export": exported(False),
    "strict export": exported(True),
    "decomposed export": exported(False, decomposed=True),
    "jit.trace": lambda module, x: torch.jit.trace(module, x, check_trace=False),
    "symbolic_trace": lambda module, x: torch.fx.symbolic_trace(module),
}


def assert_trains_alike(traced: nn.Module, plain: nn.Module, device: torch.device) -> None:
    for _ in range(5):
        x = torch.randn(4, 3, 3, 3, device=device) * 3 + 1
        results = []
        for module in (traced, plain):
            y = module(x)
            names, parameters = zip(*module.named_parameters(), strict=True)
            grads = torch.autograd.grad(y.square().sum(), parameters)
            results.append((y.detach(), dict(zip(names, grads, strict=True)), dict(module.named_buffers())))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tracer", TRACERS)
def test_traced_training_is_training(tracer: str, backend: str, device) -> None:
    plain = network().to(device)
    traced = TRACERS[tracer](copy.deepcopy(plain), torch.randn(4, 3, 3, 3, device=device))
    plain.load_state_dict(traced.state_dict())  # jit.trace runs what it traces
    assert_trains_alike(traced, plain, device)
    assert plain[1].num_batches_tracked >= 5


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_the_operator(pre_dispatch: bool, backend: str, device) -> None:
    module, x = network().to(device), torch.randn(4, 3, 3, 3, device=device)
    graph = make_fx(module, pre_dispatch=pre_dispatch)(x).graph
    assert OPS.forward in [node.target for node in graph.nodes]
    assert module[1].num_batches_tracked == 1


def test_saved_graphs_train(eager: None, device, tmp_path: Path) -> None:
    plain = network().to(device)
    x = torch.randn(4, 3, 3, 3, device=device)
    torch.export.save(torch.export.export(copy.deepcopy(plain), (x,)), tmp_path / "exported.pt2")
    assert_trains_alike(torch.export.load(tmp_path / "exported.pt2").module(), copy.deepcopy(plain), device)
    torch.jit.trace(plain, x, check_trace=False).save(tmp_path / "traced.pt")
    assert_trains_alike(torch.jit.load(tmp_path / "traced.pt"), plain, device)


def test_the_operator_is_differentiable_twice(eager: None, device) -> None:
    """As an exported graph has it; r and d are constants."""
    mean, var = torch.zeros(3, device=device).double(), torch.ones(3, device=device).double()
    ramps = ([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (mean.clone(), var.clone(), None)
        return OPS.forward(x, weight, bias, *statistics, 0.1, 1e-5, *ramps, True)[0]

    leaves = [
        torch.randn(4, 3, 2, device=device),
        torch.randn(3, device=device),
        torch.randn(3, device=device),
    ]
    leaves = [t.double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(operator, leaves)
    assert torch.autograd.gradgradcheck(operator, leaves)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "gaps": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels_last gaps": lambda x: x.to(memory_format=torch.channels_last)[:, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (7, 5, 2, 1)),
    "one channel": lambda x: x[:, :1],
    "one row": lambda x: x[:1].to(memory_format=torch.channels_last),
    "one column": lambda x: x[..., :1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_what_they_stand_for(layout: str, backend: str, device) -> None:
    """A compiler may hand any layout to the operators, and relies on the strides that they promise."""
    x = LAYOUTS[layout](torch.randn(4, 6, 4, 5, device=device))
    vector, ramp = torch.ones(x.shape[1], device=device), [3.0, 3.0, 0.0, 1.0]
    _, saved = OPS.inference(x, vector, vector, vector, vector, 1e-5, True)
    statistics = (vector.clone(), vector.clone(), None, 0.1, 1e-5, ramp, ramp, True)
    calls = [
        (OPS.forward, (x, None, None, *statistics)),
        (OPS.statistics, (x, vector, None, *statistics)),
        (OPS.normalise, (x, vector, vector, saved)),
        (OPS.inference, (x, vector, None, vector, vector, 1e-5, True)),
        (OPS.backward, (torch.randn_like(x), x, None, saved, False, [True, False, False])),
    ]
    for other in ("contiguous", "channels_last", "expanded", "gaps"):
        dy = LAYOUTS[other](torch.randn(x.shape, device=device)) if x.numel() else torch.randn_like(x)
        calls.append((OPS.backward, (dy, x, vector, saved, True, [True, True, True])))
    for operator, arguments in calls:
        dense = operator(*(t.contiguous() if isinstance(t, Tensor) else t for t in copy.deepcopy(arguments)))
        real = operator(*arguments)
        torch.testing.assert_close(real, dense)
        if isinstance(real, Tensor):
            real = (real,)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
            fake = (fake,) if isinstance(fake, Tensor) else fake
        described = [[(t.shape, t.stride(), t.dtype) for t in ts] for ts in (real, fake)]
        assert described[0] == described[1]
