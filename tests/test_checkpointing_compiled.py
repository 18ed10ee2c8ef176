"""torch.compile around checkpointed segments, and inside them; selective checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import inputs
from test_checkpointing import (
    assert_same,
    everything,
    nested,
    network,
    part_by_part,
    plain,
    twice_in_one,
    whole,
)
from test_compile import inductor_works
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triton_brn.ops import OPS

WAYS = {
    "hooks": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}
Compile = Callable[[Callable], Callable]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Nothing from the compiler's caches: graphs of other versions of this code may be in them."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.fixture(params=["aot_eager", "aot_eager_decomp_partition"])
def compiled(request: pytest.FixtureRequest) -> Compile:
    return functools.partial(torch.compile, backend=request.param, fullgraph=True)


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(3, 2, 3, 2, device=device) * 3 + 1


def out_of_place(limits: str = "corrects", device: Any = None) -> nn.ModuleList:
    """The network without in-place operations: torch refuses them after what is saved for recomputations."""
    m = network(limits, device)
    for module in m.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return m


@pytest.mark.parametrize(("way", "program"), [("hooks", nested), ("reentrant", twice_in_one)])
def test_around(compiled: Compile, program: Callable, way: str, x: Tensor, eager: None) -> None:
    m = network(device=x.device)
    found = everything(lambda m, x: compiled(lambda x: program(m, x, WAYS[way]))(x), m, x, steps=1)
    assert_same(found, everything(program, m, x, plain, steps=1), 2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_inside(compiled: Compile, way: str, x: Tensor, eager: None) -> None:
    m = network(device=x.device)

    def program(m: nn.ModuleList, x: Tensor) -> Tensor:
        return WAYS[way](compiled(nn.Sequential(*m)), x)

    assert_same(everything(program, m, x, steps=1), everything(whole, m, x, plain, steps=1), 2e-5)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_inductor(where: str, x: Tensor, eager: None) -> None:
    if reason := inductor_works():
        pytest.skip(reason)
    m = network(device=x.device)

    def segment(x: Tensor) -> Tensor:
        return m[1](m[0](x))

    if where == "around":
        program = torch.compile(lambda x: WAYS["hooks"](segment, x), fullgraph=True)
    else:
        program = functools.partial(WAYS["hooks"], torch.compile(segment))
    found = everything(lambda _, x: program(x), m[:0], x, steps=1)
    found += [*(p.grad for p in m[:2].parameters()), *m[:2].buffers()]
    expected = everything(lambda m, x: m[1](m[0](x)), network(device=x.device)[:2], x, steps=1)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_kernels(where: str, device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    m, x = network(device=device), torch.randn(2, 2, 2, 2, device=device) * 3 + 1
    compiled = functools.partial(torch.compile, backend="aot_eager_decomp_partition")

    def program(m: nn.ModuleList, x: Tensor) -> Tensor:
        if where == "around":
            return compiled(lambda x: nested(m, x, WAYS["hooks"]))(x)
        return WAYS["hooks"](compiled(nn.Sequential(*m)), x)

    assert_same(everything(program, m, x, steps=1), everything(nested, m, x, plain, steps=1))


def test_a_graph_saves_what_the_segment_takes_and_a_few_numbers(x: Tensor, eager: None) -> None:
    m = network(device=x.device)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    program = torch.compile(lambda x: whole(m, x, WAYS["hooks"]), backend="aot_eager_decomp_partition")
    expected = everything(whole, m, x, plain, steps=1)
    with saved_tensors_hooks(pack, lambda t: t):
        y = program(x.requires_grad_())
    y.square().sum().backward()
    assert_same([x.grad], [expected[1]], 2e-5)
    assert [n for n in sizes if n > 5 * 3] == [x.numel()]  # what the segment takes; else (5, C) at most


@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_a_budget_of_memory(budget: float, x: Tensor, eager: None) -> None:
    """The compiler chooses what to compute again; never what updates statistics."""
    m = network(device=x.device)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        program = torch.compile(
            lambda x: m[2](m[1](m[0](x))), backend="aot_eager_decomp_partition", fullgraph=True
        )
        y = program(x.requires_grad_())
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in m.parameters()), *m.buffers()]
    assert_same(found, everything(whole, network(device=x.device), x.detach(), plain, steps=1), 2e-5)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_graph_breaks(where: str, x: Tensor, eager: None) -> None:
    m = network(device=x.device)

    def segment(x: Tensor) -> Tensor:
        x = m[1](m[0](x))
        torch._dynamo.graph_break()
        return m[2](x)

    compiled = functools.partial(torch.compile, backend="aot_eager")
    if where == "around":
        y = compiled(lambda x: WAYS["hooks"](segment, x))(x.requires_grad_())
    else:
        y = WAYS["hooks"](compiled(segment), x.requires_grad_())
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in m.parameters()), *m.buffers()]
    assert_same(found, everything(whole, network(device=x.device), x.detach(), plain, steps=1), 2e-5)


POLICIES: dict[str, Any] = {
    "what we save": [OPS.forward],
    "convolutions": [torch.ops.aten.convolution.default],
    "nothing": [],
    "all": lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_SAVE,
}


@pytest.mark.parametrize("program", [nested, twice_in_one])
@pytest.mark.parametrize("policy", [*POLICIES, "every second"])
def test_selective(policy: str, program: Callable, x: Tensor, eager: None) -> None:
    calls = iter(range(1000))

    def every_second(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is OPS.forward and next(calls) % 2
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES.get(policy, every_second))
    way = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    m = out_of_place(device=x.device)
    assert_same(everything(program, m, x, way), everything(program, m, x, plain))


@pytest.mark.parametrize("policy", ["what we save", "nothing"])
def test_selective_and_compiled(policy: str, x: Tensor, eager: None) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
    way = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    m = out_of_place(device=x.device)
    found = everything(
        lambda m, x: torch.compile(
            lambda x: part_by_part(m, x, way), backend="aot_eager_decomp_partition", fullgraph=True
        )(x),
        m,
        x,
        steps=1,
    )
    assert_same(found, everything(part_by_part, m, x, plain, steps=1), 2e-5)


def test_logged(x: Tensor, eager: None) -> None:
    """debug=True watches every operation."""
    m = network(device=x.device)
    way = functools.partial(checkpoint, use_reentrant=False, debug=True)
    assert_same(everything(whole, m, x, way), everything(whole, m, x, plain))


def test_composable(x: Tensor, eager: None) -> None:
    """torch.distributed's, which stands on no Python frame."""
    composable = pytest.importorskip("torch.distributed._composable").checkpoint
    m = network(device=x.device)
    expected = everything(whole, m, x, plain)
    for module in (*m, model := nn.Sequential(*m)):
        composable(module)
    x.requires_grad_()
    for _ in range(2):
        model(x).square().sum().backward()
    assert_same([x.grad, *(p.grad for p in m.parameters()), *m.buffers()], expected[2:])


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_opcheck(backend: str, device) -> None:
    case = inputs((4, 3, 2, 3), device=device)
    tensors = (case.x, case.weight, case.bias)
    settings = (torch.tensor(4, device=device), 0.1, 1e-5, [1.0, 3.0, 0.0, 8.0], [0.0, 5.0, 0.0, 8.0], True)
    torch.library.opcheck(OPS.statistics, (*tensors, case.running_mean, case.running_var, *settings))
    y, saved = OPS.forward(*tensors, case.running_mean, case.running_var, *settings)
    torch.library.opcheck(OPS.normalise, (*tensors, saved))
    torch.testing.assert_close(OPS.normalise(*tensors, saved), y)


def test_a_compiled_backward_that_updates_statistics_is_refused(x: Tensor, eager: None) -> None:
    """As graphs in the compiler's cache may that an earlier version made."""
    layer = network(device=x.device)[0][1]
    args = (layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.num_batches_tracked)

    class CompiledFunction(torch.autograd.Function):
        _aot_id = 0  # torch's have one

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            images = dy.detach().expand(2, 3, 2, 2).contiguous()
            return OPS.forward(images, *args, 0.1, 1e-5, [1.0] * 4, [0.0] * 4, True)[0].sum() * dy

    y = CompiledFunction.apply(torch.ones((), requires_grad=True))
    with pytest.raises(RuntimeError, match=r"which torch.compile made, .*TORCHINDUCTOR_CACHE_DIR"):
        y.backward()
    assert layer.num_batches_tracked.item() == 0
