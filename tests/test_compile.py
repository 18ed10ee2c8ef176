"""torch.compile, autocast and opcheck: the operators as torch sees them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_accurate, batch_renorm_reference, inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from triton_brn import BatchRenorm2d, Ramp
from triton_brn.ops import OPS

RAMP = {"r_max": Ramp(1.0, 3.0, begin=0, end=3), "d_max": Ramp(0.0, 5.0, begin=0, end=3)}


@functools.cache
def inductor_works() -> str:
    """Why torch.compile's default backend cannot build for the CPU here; empty where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as error:
        return f"no C++ compiler that inductor can use: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """torch.compile without graph breaks."""
    torch._dynamo.reset()
    if request.param == "inductor" and (reason := inductor_works()):
        pytest.skip(reason)
    return lambda module: torch.compile(module, fullgraph=True, backend=request.param)


def network(affine: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), BatchRenorm2d(3, affine=affine, momentum=0.3, **RAMP), nn.Tanh())


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    y = module(x)
    wanted = [x, *module.parameters()]
    dx, *grads = torch.autograd.grad(y.float().square().sum(), wanted)
    return y.detach(), dx, grads


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_is_uncompiled(compiled: Callable, eager: None, device) -> None:
    plain = network().to(device)
    other = copy.deepcopy(plain)
    fast = compiled(other)
    for _ in range(4):  # through the ramps; one graph must serve them all
        x = torch.randn(4, 2, 3, 3, device=device) * 3 + 1
        assert_same(step(fast, x), step(plain, x))
        assert_same(list(other.buffers()), list(plain.buffers()))
    assert plain[1].num_batches_tracked.item() == 4
    assert other[1].num_batches_tracked.item() == 4
    plain.eval(), other.eval()
    assert_same(step(fast, x), step(plain, x))
    with torch.no_grad():
        assert_same(fast(x), plain(x))
        assert_same(fast.train()(x), plain.train()(x))
    assert_same(list(other.buffers()), list(plain.buffers()))


def test_one_graph_serves_every_step(eager: None, device) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    module = torch.compile(network().to(device), fullgraph=True, backend=counter)
    for _ in range(5):
        module(torch.randn(4, 2, 3, 3, device=device)).sum().backward()
    assert counter.frame_count == 1


def test_compiled_kernels_without_affine(backend: str, device) -> None:
    """The operators are opaque to the compiler: whichever backend serves them."""
    torch._dynamo.reset()
    plain = network(affine=False).to(device)
    other = copy.deepcopy(plain)
    fast = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3, 3, device=device)
    for module in (plain, other):
        module(x)
    assert_same(step(fast, x), step(plain, x))
    assert_same(list(other.buffers()), list(plain.buffers()))


@pytest.mark.parametrize(
    ("dtype", "with_compile"), [(torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_autocast(dtype: torch.dtype, with_compile: bool, backend: str, device) -> None:
    layer = BatchRenorm2d(3, r_max=3.0, d_max=5.0).to(device)
    first = nn.Conv2d(2, 3, 1, device=device)
    model = nn.Sequential(first, layer)
    if with_compile:
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3, 3, device=device)
    before = copy.deepcopy(layer)
    with torch.autocast(device.type, dtype):
        y = model(x)
        z = first(x)
    y.sum().backward()
    assert z.dtype == y.dtype == dtype
    assert {t.dtype for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)} == {
        torch.float32
    }
    assert layer.weight.grad.dtype == first.weight.grad.dtype == torch.float32
    expected = batch_renorm_reference(z.detach(), before.running_mean, before.running_var)
    assert_accurate(y, expected.y)
    assert_accurate(layer.running_mean, expected.running_mean, scale=expected.running_mean.abs().max())
    assert_accurate(layer.running_var, expected.running_var)


OPCHECKS = {
    "grad": {"requires_grad": True},
    "no affine": {"affine": False},
    "gaps": {"layout": "gaps"},
    "half": {"dtype": torch.float16, "layout": "channels_last", "requires_grad": True},
    "double": {"dtype": torch.float64},
}


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # the Functions are above
@pytest.mark.parametrize(
    ("backend", "what"),
    [("eager", what) for what in OPCHECKS] + [("triton", what) for what in ("grad", "no affine", "half")],
    indirect=["backend"],
)
def test_opcheck(what: str, backend: str, device) -> None:
    options = dict(OPCHECKS[what])
    requires_grad = options.pop("requires_grad", False)
    case = inputs((4, 3, 2, 3), device=device, **options)
    leaves = [
        None if t is None else t.detach().requires_grad_(requires_grad)
        for t in (case.x, case.weight, case.bias)
    ]
    statistics = (case.running_mean, case.running_var)
    step = torch.tensor(4, device=device)
    ramps = ([1.0, 3.0, 0.0, 8.0], [0.0, 5.0, 0.0, 8.0])
    for counter, average_std in ((step, True), (None, False)):
        torch.library.opcheck(OPS.forward, (*leaves, *statistics, counter, 0.1, 1e-5, *ramps, average_std))
    for save in (True, False):
        torch.library.opcheck(OPS.inference, (*leaves, *statistics, 1e-5, save))
    saved = OPS.inference(*leaves, *statistics, 1e-5, True)[1].detach()
    for training, needs in (
        (True, [True, True, True]),
        (False, [True, False, False]),
        (False, [False, True, True]),
    ):
        torch.library.opcheck(OPS.backward, (case.dy, leaves[0], leaves[1], saved, training, needs))
