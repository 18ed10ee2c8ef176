"""batch_renorm: the function under the layers; its checks and its autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import checkpointing, composed, eager, ops, recomputed_graphs, traces
from .backend import uses_triton
from .ops import is_traced
from .ramp import Limit, Ramp, as_ramp
from .validate import Average, check_batch, check_numbers, check_tensors

Settings: TypeAlias = tuple[float, float, list[float], list[float], bool]


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    num_batches_tracked: Tensor | None = None,
    running_average: Average = "std",
) -> Tensor:
    """Batch Renormalization (Ioffe 2017, Algorithm 1) over every axis but the second.

    In training, the minibatch normalises itself, corrected per channel towards the running
    statistics, which are then updated in place::

        x_hat = (x - mu_B) / sigma_B * r + d            y = weight * x_hat + bias
        r = clip(sigma_B / sigma, 1/r_max, r_max)       d = clip((mu_B - mu) / sigma, -d_max, d_max)

    r and d are constants of the gradient. Otherwise ``y = weight * (x - mu) / sigma + bias``.

    Args:
        input: (N, C) or (N, C, ...); float32, float64, float16 or bfloat16, any strides. A tensor
            with gaps or overlaps between its elements is first copied to a dense one.
        running_mean: (C,) mu; float64 for a float64 input, else float32. Updated in training.
        running_var: (C,) sigma^2 - eps, same dtype. Updated in training.
        weight, bias: (C,) gamma and beta; the input's dtype or, for a half-precision input, float32.
        training: normalise with the minibatch and update the statistics.
        momentum: alpha, the weight of the new batch (torch's convention), in [0, 1]. None: the
            cumulative average, 1 / (number of batches).
        eps: added to the variance inside the square root.
        r_max, d_max: clipping limits, >= 1 and >= 0. A number, None (no clipping) or a ``Ramp``
            over ``num_batches_tracked``.
        num_batches_tracked: integer scalar counter of the batches seen; incremented in training.
            Required by ``Ramp`` and by ``momentum=None``.
        running_average: what is averaged: ``"std"``, the standard deviation with eps inside
            (the paper), or ``"var"``, the unbiased variance (torch.nn.BatchNorm).

    Returns:
        A tensor of the input's shape, dtype and memory format.

    An empty batch changes no statistics. A channel whose batch holds a NaN or inf gives NaN and
    keeps its running statistics.

    Raises:
        TypeError, ValueError: an argument that cannot be served, by name; nothing has been changed.
        RuntimeError: an inference tensor that would have to be updated or saved; nothing has been changed.
    """
    traced = is_traced(input)
    if traced and not isinstance(input, Tensor):
        return traces.of_stand_in(
            batch_renorm,
            (input, running_mean, running_var, weight, bias),
            training=training,
            momentum=momentum,
            eps=eps,
            r_max=r_max,
            d_max=d_max,
            num_batches_tracked=num_batches_tracked,
            running_average=running_average,
        )
    transformed = _are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and is_dual(input, running_mean, running_var, weight, bias)
    )
    if traced and not transformed and not (training and traces.train()):
        return traces.inference(input, running_mean, running_var, weight, bias, eps)
    settings = settings_of(momentum, eps, r_max, d_max, running_average)
    check_tensors(input, running_mean, running_var, weight, bias, num_batches_tracked)
    if transformed:
        tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked)
        return _composed(*tensors, settings, training)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not training and (traced or not checkpointing.trained(running_mean)):
        if needs_grad(input, weight, bias):
            return BatchRenormInference.apply(input, weight, bias, running_mean, running_var, eps)
        return ops.inference(input, weight, bias, running_mean, running_var, eps, False)[0]
    check_batch(input, weight, bias, running_mean, running_var, num_batches_tracked, settings, traced)
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked)
    if (not traced or not is_dynamo_compiling()) and checkpointing.acts() and input.numel():
        return _repeated(tensors, settings, traced)
    if traced:
        return ops.OPS.forward(*tensors, *settings)[0]  # differentiable, see exported.py
    if needs_grad(input, weight, bias):
        if not input.is_cpu or not input.numel() or uses_triton(input.device):
            return _training(*tensors, settings)
        return _plain_training(*tensors, settings)
    return ops.forward(*tensors, *settings)[0]


batch_renorm.__prepare_scriptable__ = traces.refuse_script  # type: ignore[attr-defined]


def settings_of(*numbers: Any) -> Settings:
    """momentum, eps, r_max, d_max and running_average, checked, as the ops take them."""
    if is_dynamo_compiling():
        return _settings_of(*numbers)
    try:
        return _settings_before(*numbers)
    except TypeError:  # an argument that cannot be hashed, or one that is refused, by name
        return _settings_of(*numbers)


def _settings_of(
    momentum: float | None, eps: float, r_max: Limit, d_max: Limit, running_average: Average
) -> Settings:
    check_numbers(momentum, eps, running_average)
    r_ramp, d_ramp = as_ramp("r_max", r_max, 1.0), as_ramp("d_max", d_max, 0.0)
    alpha = -1.0 if momentum is None else float(momentum)
    return alpha, float(eps), limits(r_ramp), limits(d_ramp), running_average == "std"


_settings_before = functools.lru_cache(maxsize=256, typed=True)(_settings_of)


def limits(ramp: Ramp) -> list[float]:
    """A ramp as the ops take it: one of no length, which switches at ``end``, gets a length of 1."""
    return [ramp.start, ramp.stop, float(min(ramp.begin, ramp.end - 1)), float(ramp.end)]


def _composed(x, weight, bias, running_mean, running_var, step, settings, training) -> Tensor:  # type: ignore[no-untyped-def]
    """batch_renorm under torch.func's transforms and in forward-mode AD."""
    if not training:
        return composed.inference(x, weight, bias, running_mean, running_var, settings[1])
    transforms, traced = _are_functorch_transforms_active(), is_traced(x)
    check_batch(x, weight, bias, running_mean, running_var, step, settings, transforms or traced)
    if not is_dynamo_compiling():
        if traced and not transforms:
            refuse_linearize()
        if checkpointing.acts():
            where = "torch.func" if transforms else "forward-mode AD"
            checkpointing.refuse_recomputation(running_mean, where)
    return composed.forward(x, weight, bias, running_mean, running_var, step, *settings)


def is_dual(*tensors: Tensor | None) -> bool:
    """Whether any has a tangent: a level of forward AD is active in all threads, or in none."""
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_linearize() -> None:
    """It traces a level of forward AD; what it traces it runs for every tangent."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        raise RuntimeError(
            "batch_renorm: torch.func.linearize would run a training call twice, and update the running "
            "statistics at every use of its result. Call eval() first, or use torch.func.jvp"
        )


def needs_grad(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


class BatchRenorm(torch.autograd.Function):
    """Forward with the minibatch's statistics; r and d are constants of the gradient."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, step, settings):  # type: ignore[no-untyped-def]
        y, saved = ops.forward(x, weight, bias, running_mean, running_var, step, *settings)
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = settings[1]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        return (*_gradients(ops.backward, True, ctx, dy, *ctx.saved_tensors), None, None, None, None)


class PlainBatchRenorm(torch.autograd.Function):
    """The same in plain PyTorch without operators, of which a small input would feel each."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, step, settings):  # type: ignore[no-untyped-def]
        with _AutoDispatchBelowAutograd():  # saves 2 us per torch operation where inputs require grad
            y, saved = eager.forward(x, weight, bias, running_mean, running_var, step, *settings)
        _save(ctx, x, weight, saved, settings[1])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd, *rest = ctx.saved_tensors
        saved = eager.Saved(mean, rest[0] if rest else None, rstd, *ctx.correction)
        return (*_gradients(_plain_backward, True, ctx, dy, x, weight, saved), None, None, None, None)


def _save(ctx: Any, x: Tensor, weight: Tensor | None, saved: eager.Saved, eps: float) -> None:
    mean, rest, rstd, *ctx.correction, _ = saved
    ctx.save_for_backward(x, weight, mean, rstd, *([] if rest is None else [rest]))
    ctx.eps = eps


def _plain_backward(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    if is_dynamo_compiling():  # compiled autograd
        return ops.backward(dy, x, weight, eager.stacked(saved), training, needs)
    with _AutoDispatchBelowAutograd():
        return eager.backward(dy, x, weight, saved, training, needs)


# ``apply`` without what torch adds for functorch, which costs 6 us.
_training = super(torch.autograd.Function, BatchRenorm).apply
_plain_training = super(torch.autograd.Function, PlainBatchRenorm).apply


def _repeated(tensors: Any, settings: Any, traced: bool) -> Tensor:
    """A training call that may run again, or runs again: see checkpointing.py."""
    x, weight, bias, running_mean, *_ = tensors
    where = checkpointing.place(checkpointing.layer_of(running_mean))
    kept = where.again(x)
    if kept is not None and not kept.learned and settings[0] != 0:
        kept.learned = True  # fairscale's checkpointing has it so: learning in the second pass alone
        eager.learn(kept.numbers, tensors, settings)
    function: Any = RepeatedPlainBatchRenorm
    if traced or not x.is_cpu or uses_triton(x.device):
        function = RepeatedBatchRenorm
        with _AutoDispatchBelowAutograd(), checkpointing.acting(where, kept):
            made = ops.repeated_forward(*tensors, *settings)
    elif kept is None:
        with _AutoDispatchBelowAutograd():
            made = eager.forward(*tensors, *settings)
        where.keep(x, made[1], settings[0])
    else:
        with _AutoDispatchBelowAutograd():
            made = eager.again(x, kept.numbers), kept.numbers
    return function.apply(x, weight, bias, made, settings[1]) if needs_grad(x, weight, bias) else made[0]


class RepeatedBatchRenorm(BatchRenorm):
    """``BatchRenorm`` of what ``forward`` returned."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, made, eps):  # type: ignore[no-untyped-def,override]
        y, saved = made
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = eps
        return y


class RepeatedPlainBatchRenorm(PlainBatchRenorm):
    """``PlainBatchRenorm`` of what ``eager.forward`` returned."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, made, eps):  # type: ignore[no-untyped-def,override]
        y, saved = made
        _save(ctx, x, weight, saved, eps)
        return y


class BatchRenormInference(torch.autograd.Function):
    """Forward with the running statistics, which are constants of the gradient."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, eps):  # type: ignore[no-untyped-def]
        y, saved = ops.inference(x, weight, bias, running_mean, running_var, eps, True)
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        return (*_gradients(ops.backward, False, ctx, dy, *ctx.saved_tensors), None, None, None)


def _gradients(backward: Callable[..., Any], training: bool, ctx: Any, dy, x, weight, saved):  # type: ignore[no-untyped-def]
    """The gradients of x, weight and bias that are asked for, by ``backward`` or in operations that compose:
    under create_graph, of dual numbers, of many dy at a time."""
    needs = ctx.needs_input_grad[:3]
    composes = is_grad_enabled() or _are_functorch_transforms_active()
    composes = composes or (forward_ad._current_level >= 0 and is_dual(dy, x, weight))
    if composes and not torch.compiler.is_compiling():
        grads = composed.backward(dy, x, weight, saved, training, ctx.eps)
    else:
        try:
            grads = backward(dy, x, weight, saved, training, needs)
        except RuntimeError:
            if not is_legacy_batchedtensor(dy):  # is_grads_batched=True has a vmap of its own
                raise
            grads = composed.backward(dy, x, weight, saved, training, ctx.eps)
    return grads if all(needs) else tuple(g if need else None for g, need in zip(grads, needs, strict=True))


recomputed_graphs.register()
