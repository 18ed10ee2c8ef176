"""Checkpointed segments: gradients and running statistics are those of the plain run, to the bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from triton_brn import BatchRenorm2d, Ramp

LIMITS = {
    "new": {},  # r = 1, d = 0
    "corrects": {"r_max": 3.0, "d_max": 5.0, "momentum": 0.3},
    "ramps": {
        "r_max": Ramp(1.0, 3.0, begin=0, end=9),
        "d_max": Ramp(0.0, 5.0, begin=0, end=9),
        "momentum": None,
    },
}


class Checkpoint(torch.autograd.Function):
    """Checkpointing as other libraries write it."""

    @staticmethod
    def forward(ctx: Any, function: Callable, *args: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*args)
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        args = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.function(*args)
        torch.autograd.backward(outputs, grads)
        return None, *(t.grad for t in args)


class DecoratedCheckpoint(Checkpoint):
    """The same, its ctx among ``*args``."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return Checkpoint.forward(*args)


def plain(function: Callable, *args: Tensor) -> Any:
    return function(*args)


def without_early_stop(function: Callable, *args: Tensor) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False)


WAYS = {
    "hooks": functools.partial(checkpoint, use_reentrant=False),
    "hooks, no early stop": without_early_stop,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "other": lambda function, *args: Checkpoint.apply(function, *args),
    "other, decorated": lambda function, *args: DecoratedCheckpoint.apply(function, *args),
}


def network(limits: str = "corrects", device: Any = None) -> nn.ModuleList:
    """Three parts with statistics that the batches are far from."""
    torch.manual_seed(1)
    parts = []
    for features in (2, 3, 3):
        layer = BatchRenorm2d(3, **LIMITS[limits])
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        parts.append(nn.Sequential(nn.Conv2d(features, 3, 1), layer, nn.ReLU(inplace=True)))
    return nn.ModuleList(parts).to(device)


def whole(m: nn.ModuleList, x: Tensor, ckpt: Callable) -> Tensor:
    return ckpt(lambda x: m[2](m[1](m[0](x))), x)


def part_by_part(m: nn.ModuleList, x: Tensor, ckpt: Callable) -> Tensor:
    for part in m:
        x = ckpt(part, x)
    return x


def nested(m: nn.ModuleList, x: Tensor, ckpt: Callable, inner: Callable | None = None) -> Tensor:
    inner = inner or ckpt
    return ckpt(lambda x: inner(lambda x: m[2](inner(m[1], x)), m[0](x)), x)


def calls_before_backward(m: nn.ModuleList, x: Tensor, ckpt: Callable) -> Tensor:
    """One layer in three segments, then one backward: the last is recomputed first."""
    return sum(ckpt(lambda x: m[1](m[0](x)), x * k + k) for k in (1, 2, 3))  # type: ignore[return-value]


def twice_in_one(m: nn.ModuleList, x: Tensor, ckpt: Callable) -> Tensor:
    return ckpt(lambda x: m[1](m[1](m[0](x))) + m[1](m[0](2 * x)), x)


PROGRAMS = (whole, part_by_part, nested, calls_before_backward, twice_in_one)
#: Where one parameter's gradients come from several calls, a backward inside a backward adds them in another
#: order: BatchNorm's differ as much.
REORDERED = {calls_before_backward: 1e-5, twice_in_one: 1e-5}


def everything(program: Callable, m: nn.ModuleList, x: Tensor, *args: Any, steps: int = 2) -> list[Tensor]:
    """Outputs, gradients and buffers of so many steps of ``program``."""
    m, x = copy.deepcopy(m), x.clone().requires_grad_()
    found = []
    for _ in range(steps):
        y = program(m, x, *args)
        y.square().sum().backward()
        found.append(y.detach())
    return [*found, x.grad, *(p.grad for p in m.parameters() if p.grad is not None), *m.buffers()]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = max(float(b.detach().abs().max()), 1.0)  # gradients of a bias before a norm are nothing
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture
def x(device) -> Tensor:
    return torch.randn(3, 2, 3, 2, device=device) * 3 + 1


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limits", LIMITS)
def test_as_the_plain_run(limits: str, way: str, program: Callable, x: Tensor, eager: None) -> None:
    m = network(limits, x.device)
    tolerance = 0.0 if way.startswith("hooks") else REORDERED.get(program, 0.0)
    assert_same(everything(program, m, x, WAYS[way]), everything(program, m, x, plain), tolerance)


@pytest.mark.parametrize("way", ["hooks", "reentrant"])
def test_kernels_as_the_plain_run(way: str, device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    m, x = network(device=device), torch.randn(2, 2, 2, 2, device=device) * 3 + 1
    assert_same(everything(nested, m, x, WAYS[way], steps=1), everything(nested, m, x, plain, steps=1))


@pytest.mark.parametrize("outer", WAYS)
@pytest.mark.parametrize("inner", WAYS)
@pytest.mark.parametrize("limits", ["new", "corrects"])
def test_mixed_nests(limits: str, inner: str, outer: str, x: Tensor, eager: None) -> None:
    m = network(limits, x.device)
    found = everything(nested, m, x, WAYS[outer], WAYS[inner])
    assert_same(found, everything(nested, m, x, plain))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sequential(use_reentrant: bool, x: Tensor, eager: None) -> None:
    m = network(device=x.device)
    found = everything(
        lambda m, x: checkpoint_sequential(nn.Sequential(*m), 2, x, use_reentrant=use_reentrant), m, x
    )
    assert_same(found, everything(whole, m, x, plain))
