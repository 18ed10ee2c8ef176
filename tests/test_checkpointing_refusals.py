"""What checkpointing cannot serve is refused, with the cure; what it relies on in torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpointing import Checkpoint, assert_same, network, plain, whole
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from triton_brn import BatchRenorm2d, saved_tensor_hooks


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(3, 2, 3, 2, device=device) * 3 + 1


@pytest.fixture
def m(device) -> nn.ModuleList:
    return network(device=device)


def test_another_input_in_the_recomputation(x: Tensor, eager: None) -> None:
    layer = BatchRenorm2d(2).to(x.device)
    inputs = [x, x[1:]]
    y = checkpoint(lambda w: layer(inputs.pop(0) * w), torch.ones(1, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"expected \(3, 2, 3, 2\) of torch.float32, got \(2, 2, 3, 2\)"):
        y.sum().backward()
    assert layer.num_batches_tracked.item() == 1


def test_more_calls_in_the_recomputation(x: Tensor, eager: None) -> None:
    layer, calls = BatchRenorm2d(2).to(x.device), [1, 2]

    def segment(x: Tensor) -> Tensor:
        for _ in range(calls.pop(0)):
            x = layer(x)
        return x

    y = checkpoint(segment, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="same calls in both passes"):
        y.sum().backward()


class ContextLater(Checkpoint):
    """A checkpoint whose forward has no ctx."""

    @staticmethod
    def forward(function: Callable, x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(inputs[1])


def test_a_way_that_cannot_be_served(x: Tensor, eager: None) -> None:
    layer = BatchRenorm2d(2).to(x.device)
    y = ContextLater.apply(lambda x: layer(x), x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"backward of ContextLater .* Use torch.utils.checkpoint"):
        y.sum().backward()
    assert layer.num_batches_tracked.item() == 1


def test_hooks_that_recompute_by_themselves(x: Tensor, eager: None) -> None:
    layer = BatchRenorm2d(2).to(x.device)

    def recompute(_: Any) -> Tensor:
        return layer(x)

    with saved_tensors_hooks(lambda t: t if t.ndim < 4 else None, lambda t: recompute(t) if t is None else t):
        y = layer(x * torch.ones(1, requires_grad=True)).square().sum()
    with pytest.raises(RuntimeError, match="a saved-tensor hook that is not torch's checkpointing"):
        y.backward()


def test_a_forward_in_a_hook_is_one_of_its_own(m: nn.ModuleList, x: Tensor, eager: None) -> None:
    """A backward may run another model; where it is a layer of a checkpointed segment, nobody can tell."""
    other = copy.deepcopy(m)

    def run(model: nn.ModuleList) -> None:
        y = whole(m, x, functools.partial(checkpoint, use_reentrant=False))
        y.register_hook(lambda dy: whole(model, x, plain) * 0)
        y.sum().backward()

    run(other)
    assert [part[1].num_batches_tracked.item() for part in (*m, *other)] == [1] * 6
    assert_same(list(other.buffers()), list(m.buffers()))
    with pytest.raises(RuntimeError, match="in a hook of the backward"):
        run(m)


def test_what_is_relied_on_in_torch() -> None:
    """Private parts of torch; where one is missing, a recomputation raises, or these tests do."""
    for name in ("_top", "_push", "_pop"):
        assert callable(getattr(torch._C._autograd, f"{name}_saved_tensors_default_hooks"))
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert torch._C._current_graph_task_id() == -1
    assert torch._C._is_fwd_grad_enabled()
    frames: list[Any] = []

    def look(x: Tensor) -> Tensor:
        (pack, _), *_ = saved_tensor_hooks.stack()
        frames.append((saved_tensor_hooks.checkpoint_frame(pack), pack.__qualname__))
        return x.sin()

    checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    (first, _), (again, name) = frames
    assert first is again is not None
    assert "_recomputation_hook" in name
    assert first.forward_completed
    assert issubclass(torch.utils.checkpoint._StopRecomputationError, Exception)


def test_hooks_that_nobody_knows_are_refused(monkeypatch: pytest.MonkeyPatch, x: Tensor, eager: None) -> None:
    """A later torch may keep what a segment is elsewhere."""
    layer = BatchRenorm2d(2).to(x.device)
    other = type("Other", (torch.utils.checkpoint._CheckpointFrame,), {})
    monkeypatch.setattr(torch.utils.checkpoint, "_CheckpointFrame", other)
    with pytest.raises(RuntimeError, match="this torch checkpoints in a way that is not known"):
        checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    assert layer.num_batches_tracked.item() == 0
