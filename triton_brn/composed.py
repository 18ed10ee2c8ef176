"""Batch Renormalization in torch operations that compose: under torch.func's transforms, in forward-mode
AD, and for gradients of gradients. Every operation here has a derivative and a batching rule.

Speed does not matter here; the formulas are centred, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack


def forward(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y."""
    if x.numel() == 0:
        return inference(x, weight, bias, running_mean, running_var, eps)
    dtype, axes = running_mean.dtype, _axes(x)
    mean = x.detach().to(dtype).mean(axes)
    centred = x.to(dtype) - _column(mean, x)
    rest = centred.mean(axes)  # what rounding took from the mean
    centred = centred - _column(rest, x)
    var = centred.square().mean(axes)
    std = (var + eps).sqrt()

    # Constants of the gradient. detach() detaches from the transforms around this one too.
    batch = mean, rest.detach(), var.detach(), std.detach()
    mu, running_std = running_mean.detach(), (running_var.detach() + eps).sqrt()
    r_limit, d_limit = (limit_at(limit, step, dtype) for limit in (r_max, d_max))
    r = (batch[3] / running_std).clamp(1 / r_limit, r_limit)
    d = ((mean - mu + batch[1]) / running_std).clamp(-d_limit, d_limit)

    y = _affine(centred * _column(r / std, x) + _column(d, x), weight, bias)
    _update(running_mean, running_var, step, batch, x.numel() // x.shape[1], momentum, eps, average_std)
    return y.to(x.dtype)


def inference(x, weight, bias, running_mean, running_var, eps):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y."""
    centred = x.to(running_mean.dtype) - _column(running_mean, x)
    return _affine(centred * _column((running_var + eps).rsqrt(), x), weight, bias).to(x.dtype)


def backward(dy, x, weight, saved, training, eps):  # type: ignore[no-untyped-def]
    """The gradients of x, weight and bias, for gradients of gradients and for many dy at a time.

    saved: mean, rest, 1/sigma, r, d, as the operators return them or, where r = 1 and d = 0, None for both;
    r and d are constants.
    """
    mean, _, rstd, r, d, *_ = saved
    dtype, axes = mean.dtype, _axes(x)
    g, t = dy.to(dtype), x.to(dtype) - _column(mean, x)  # a constant: what it leaves of a mean is small
    if training:
        t = t - _column(t.mean(axes), x)
        rstd = (t.square().mean(axes) + eps).rsqrt()
    xn = t * _column(rstd, x)
    sum_g, sum_gx = g.sum(axes), (g * xn).sum(axes)
    if training:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        g = g - (_column(sum_g, x) + xn * _column(sum_gx, x)) / count
    scale = rstd if weight is None else weight.to(dtype) * rstd
    if r is not None:
        scale, sum_gx = scale * r, r * sum_gx + d * sum_g
    vector = dtype if weight is None else weight.dtype
    return (g * _column(scale, x)).to(x.dtype), sum_gx.to(vector), sum_g.to(vector)


def limit_at(limit: list[float], step: Tensor | None, dtype: torch.dtype) -> Any:
    """The clipping limit (start, stop, begin, end) for the batch that ``step`` batches came before."""
    start, stop, begin, end = limit
    if start == stop or step is None:
        return stop
    return start + (stop - start) * ((step.to(dtype) - begin) / (end - begin)).clamp(0, 1)


def _update(running_mean, running_var, step, batch, count, momentum, eps, average_std):  # type: ignore[no-untyped-def]
    mu, old_var = running_mean.detach(), running_var.detach()
    new: tuple[Any, Any] = (None, None)  # momentum 0: the statistics stay as they are, and may be shared
    if momentum != 0:
        alpha = momentum if momentum > 0 else 1 / (step.to(mu.dtype) + 1)
        new = _averaged(mu, old_var, batch, count, alpha, eps, average_std)
    if torch.compiler.is_compiling() or _functionalized():  # they follow operations, no Function
        _Write.forward(running_mean, running_var, step, *new)
    else:
        _Write.apply(mu, old_var, step, *new)


def _averaged(mu, old_var, batch, count, alpha, eps, average_std):  # type: ignore[no-untyped-def]
    """The next running mean and variance: the last ones in a channel whose batch holds a NaN or inf."""
    mean, rest, var, std = batch
    new_mean = mu + alpha * (mean - mu + rest)
    if average_std:
        new_var = torch.lerp((old_var + eps).sqrt(), std, alpha).square() - eps
    else:
        new_var = torch.lerp(old_var, var * (count / (count - 1)), alpha)
    finite = new_var < torch.inf
    return torch.where(finite, new_mean, mu), torch.where(finite, new_var.clamp(min=0), old_var)


class _Write(torch.autograd.Function):
    """Writes new running statistics into the old ones' memory, and counts.

    torch.func forbids in-place operations on tensors that a differentiated function captured. These are
    right: the values are constants. A Function's ``forward`` runs outside of all transforms.
    """

    @staticmethod
    def forward(running_mean, running_var, step, new_mean, new_var):  # type: ignore[no-untyped-def]
        if new_mean is not None:
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
        if step is not None:
            step.add_(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Any) -> tuple[None, None]:
        """What is batched gets its batch first: old and new are aligned then."""
        for name, old, new in zip(("running_mean", "running_var"), in_dims, in_dims[3:], strict=False):
            if old is None and new is not None:
                raise ValueError(
                    f"{name}: vmap gives every member its own statistics, but the running statistics, which "
                    "training updates in place, are shared. Stack them (torch.func.stack_module_state) and "
                    "pass them through torch.func.functional_call with in_dims=0, or call eval() first"
                )
        firsts = (t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True))
        _Write.apply(*firsts)
        return None, None


def _functionalized() -> bool:
    return any(level.key() == TransformType.Functionalize for level in get_interpreter_stack() or ())


def _affine(x_hat, weight, bias):  # type: ignore[no-untyped-def]
    """Not of (C,) products: a compiled hessian of those fails in torch 2.13."""
    y = x_hat if weight is None else x_hat * _column(weight.to(x_hat.dtype), x_hat)
    return y if bias is None else y + _column(bias.to(x_hat.dtype), x_hat)


def _axes(x: Tensor) -> list[int]:
    """All but the channels'."""
    return [0, *range(2, x.ndim)]


def _column(v: Tensor, x: Tensor) -> Tensor:
    """A value a channel, shaped to broadcast over x."""
    return v.view(1, x.shape[1], *[1] * (x.ndim - 2))
