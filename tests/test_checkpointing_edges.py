"""Checkpointed segments where more goes on than a forward and its backward."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpointing import WAYS, Checkpoint, assert_same, everything, nested, network, plain, whole
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from triton_brn import BatchRenorm1d, BatchRenorm2d, checkpointing


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(3, 2, 3, 2, device=device) * 3 + 1


def gradient(y: Tensor, *wanted: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), wanted, **options))


@pytest.fixture
def m(device) -> nn.ModuleList:
    return network(device=device)


def both(m: nn.ModuleList, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, nn.ModuleList, nn.ModuleList]:
    """Outputs of the plain run and of the checkpointed one, and their networks."""
    other = copy.deepcopy(m)
    options.setdefault("use_reentrant", False)
    return whole(m, x, plain), whole(other, x, functools.partial(checkpoint, **options)), m, other


def test_backward_twice_recomputes_twice(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    x.requires_grad_()
    y, z, m, other = both(m, x)
    for _ in range(3):
        expected = gradient(y, x, *m.parameters(), retain_graph=True)
        assert_same(gradient(z, x, *other.parameters(), retain_graph=True), expected)
    assert_same(list(other.buffers()), list(m.buffers()))
    m, other = copy.deepcopy(m), copy.deepcopy(m)
    y, z = whole(m, x, plain), whole(other, x, WAYS["reentrant"])
    for _ in range(3):
        for out in (y, z):
            out.square().sum().backward(retain_graph=True)
    assert_same([p.grad for p in other.parameters()], [p.grad for p in m.parameters()])
    assert_same(list(other.buffers()), list(m.buffers()))


def test_some_of_the_gradients(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    x.requires_grad_()
    y, z, m, other = both(m, x)
    assert_same(gradient(z, other[1][1].weight), gradient(y, m[1][1].weight))


def test_gradients_of_gradients(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    x = x.double().requires_grad_()
    y, z, m, other = both(m.double(), x)
    (dy,), (dz,) = gradient(y, x, create_graph=True), gradient(z, x, create_graph=True)
    assert_same([dz], [dy])
    assert_same(gradient(dz, x, *other.parameters()), gradient(dy, x, *m.parameters()))
    assert_same(list(other.buffers()), list(m.buffers()))


def test_saved_tensors_looked_at_by_hand(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    """Outside of any backward, and in a group of backwards, torch recomputes too."""
    x.requires_grad_()
    y, z, m, other = both(m, x)
    node = z.grad_fn
    while not hasattr(node, "_saved_weight"):
        node = node.next_functions[0][0]
    assert node._saved_weight.shape == (3, 3, 1, 1)
    if hasattr(torch.utils.checkpoint, "GraphExecGroup"):
        with torch.utils.checkpoint.GraphExecGroup():
            found = gradient(z, x, *other.parameters())
        assert_same(found, gradient(y, x, *m.parameters()))
    assert_same(list(other.buffers()), list(m.buffers()))


@pytest.mark.parametrize("way", WAYS)
def test_modes_changed_in_between(way: str, m: nn.ModuleList, x: Tensor, eager: None) -> None:
    """A recomputation is of what ran, whatever the mode is now; what did not train cannot be recomputed."""
    x.requires_grad_()
    expected = gradient(whole(copy.deepcopy(m), x, plain), x)[0]
    whole(m, x, WAYS[way]).square().sum().backward()
    state = [t.clone() for t in m.buffers()]
    x.grad = None
    m = network(device=x.device)
    y = whole(m, x, WAYS[way])
    m.eval()
    y.square().sum().backward()
    assert_same([x.grad, *m.buffers()], [expected, *state])
    y = whole(m, x, WAYS[way])
    m.train()
    with pytest.raises(RuntimeError, match="in one mode"):
        y.square().sum().backward()
    assert_same(list(m.buffers()), state)


def test_evaluation_is_recomputed_as_it_is(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    m.eval()
    for way in WAYS.values():
        assert_same(everything(whole, m, x, way), everything(whole, m, x, plain))


class Reversible(torch.autograd.Function):
    """Keeps its outputs alone: the backward runs the layers in reverse order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable, g: Callable, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.f, ctx.g = f, g
        y = x + f(x)
        z = x + g(y)
        ctx.save_for_backward(x, y)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dz: Tensor) -> Any:
        x, y = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            ctx.g(y).backward(dz)
            ctx.f(x).backward(dy + y.grad)
        return dy + y.grad + dz + x.grad, *[None] * 6


def test_layers_recomputed_in_reverse_order(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    x = torch.cat([x, x[:, :1]], 1)  # three channels, as the layers give

    def program(m: nn.ModuleList, x: Tensor, way: Callable) -> Tensor:
        if way is plain:
            y = x + m[1](x)
            return y * (x + m[2](y))
        y, z = Reversible.apply(x, m[1], m[2], *m[1].parameters())
        return y * z

    assert_same(everything(program, m, x, WAYS["hooks"]), everything(program, m, x, plain), 1e-5)


class Enabled(Checkpoint):
    """A first pass that enables gradients."""

    @staticmethod
    def forward(ctx: Any, function: Callable, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.enable_grad():
            return function(x.detach().requires_grad_()).detach()


def test_a_first_pass_with_gradients(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    found = everything(whole, m, x, lambda function, x: Enabled.apply(function, x))
    assert_same(found, everything(whole, m, x, plain))


def test_other_hooks_go_on_working(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    def offloaded(function: Callable, *args: Tensor) -> Tensor:
        with save_on_cpu():
            return function(*args)

    def within(function: Callable, *args: Tensor) -> Tensor:
        return checkpoint(lambda *args: offloaded(function, *args), *args, use_reentrant=False)

    def around(function: Callable, *args: Tensor) -> Tensor:
        return offloaded(lambda *args: checkpoint(function, *args, use_reentrant=False), *args)

    for way in (offloaded, within, around):
        assert_same(everything(nested, m, x, way), everything(nested, m, x, plain))


def test_a_backward_in_the_segment(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    def segment(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(m[0](x).square().sum(), x, create_graph=True)
        return m[0](x + g.tanh())

    def program(_: Any, x: Tensor, ckpt: Callable) -> Tensor:
        return ckpt(segment, x)

    expected = everything(program, m, x, plain)
    for name in ("hooks", "hooks, no early stop"):
        m = network(device=x.device)
        assert_same(everything(program, m, x, WAYS[name]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_kept_no_longer_than_the_graph(way: str, x: Tensor, eager: None) -> None:
    layer = BatchRenorm2d(2, r_max=3.0, d_max=5.0).to(x.device)
    gc.collect()
    before = set(checkpointing._segments)
    y = WAYS[way](layer, x.requires_grad_())
    (segment,) = set(checkpointing._segments) - before
    numbers = weakref.ref(next(iter(segment.calls.values()))[0].numbers.r)
    del segment
    y.sum().backward()
    del y
    gc.collect()
    assert numbers() is None
    with torch.no_grad():
        layer(x)  # no segment
    assert set(checkpointing._segments) <= before
    copy.deepcopy(layer)
    assert not [name for name in vars(layer) if "segment" in name]


def test_threads_have_segments_of_their_own(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    """Each thread's gradients are those of its own first pass, though they share the layers."""
    for part in m:
        part[1].momentum = 0.0
    expected = everything(whole, m, x, plain)
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        mine = copy.deepcopy(m)
        for part, shared in zip(mine, m, strict=True):
            part[1] = shared[1]
        leaf = x.clone().requires_grad_()
        for _ in range(5):
            y = whole(mine, leaf, WAYS["hooks" if i % 2 else "reentrant"])
            (found[i],) = gradient(y, leaf) if i % 2 else [torch.zeros(())]
            if not i % 2:
                leaf.grad = None
                y.square().sum().backward()
                found[i] = leaf.grad

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dx = expected[2] / 2  # of two steps
    for found_ in found.values():
        torch.testing.assert_close(found_, dx)


def test_first_passes_that_leave_the_statistics(backend: str, device) -> None:
    """fairscale sets track_running_stats to False there, of every BatchNorm: the second pass learns, once."""
    x = torch.randn(4, 2, 3, device=device) * 2 + 1
    for options in ({"momentum": 0.3}, {"momentum": None}, {"momentum": 0.3, "running_average": "var"}):
        layer = BatchRenorm1d(2, r_max=3.0, d_max=5.0, **options).to(device)
        other = copy.deepcopy(layer)

        def segment(x: Tensor, layer: BatchRenorm1d = layer) -> Tensor:
            layer.track_running_stats = torch.is_grad_enabled()
            return layer(x)

        results = []
        for function, way in ((other, plain), (segment, WAYS["reentrant"])):
            leaf = x.clone().requires_grad_()
            y = way(function, leaf)
            for _ in range(2):
                y.square().sum().backward(retain_graph=True)
            results.append([y.detach(), leaf.grad])
        if options["momentum"] is not None:  # whose first batch is not corrected, where it is counted
            assert_same(results[1], results[0])
        assert layer.num_batches_tracked.item() == 1
        for found, expected in zip(layer.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
