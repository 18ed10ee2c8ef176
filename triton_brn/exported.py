"""The operator's own gradient, for graphs that were exported or traced in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from . import ops
from .functional import _gradients, needs_grad


class BatchRenormOperator(torch.autograd.Function):
    """``BatchRenorm`` as the operator returns it, with what it saves."""

    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[no-untyped-def]
        x, weight, *_ = args
        y, saved = _below_autograd(*args)
        ctx.save_for_backward(x, weight, saved)
        ctx.mark_non_differentiable(saved)
        ctx.eps = args[7]
        return y, saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
        return (*_gradients(ops.backward, True, ctx, dy, *ctx.saved_tensors), *[None] * 8)


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with _AutoDispatchBelowAutograd():
        return ops.OPS.forward(*args)


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    return BatchRenormOperator.apply(*args) if needs_grad(*args[:3]) else _below_autograd(*args)


def register() -> None:
    ops.implement("forward", _differentiable, "Autograd")
