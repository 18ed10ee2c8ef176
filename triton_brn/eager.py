"""Batch Renormalization in plain PyTorch: what CPU users run, and the first oracle of the kernels.

torch's own normalisation kernels do the passes over x: given mu_B and sigma_B, Algorithm 1 is batch
norm with the weight gamma*r and the bias beta + gamma*d. The rest works on C numbers, where an operation
costs 1.5 us, and 4 us if it takes a Python number: small inputs are as fast as these are few. Hence the
in-place forms and ``constant``.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .passes import affine, combined, expanded_sum, moments, needs_parts, sums

aten = torch.ops.aten

#: |mean| / std from which x is centred first, for two passes more. torch's kernels compute x * a + b, which
#: loses that many times 1e-7, and so do sums: at mean 1e4, std 1e-2 BatchNorm's own y is off by 3 %.
FAR = 8.0
#: Elements and channels of (N, C) from which ``backward_of_parts`` is quicker than torch's kernel.
WIDE_ELEMENTS, WIDE_CHANNELS = 2**18, 128


class Saved(NamedTuple):
    """What backward takes beside x and weight, each (C,)."""

    mean: Tensor
    rest: Tensor | None  # what is left of the mean; None: nothing
    rstd: Tensor  # 1 / sigma_B
    r: Tensor | None  # None: r = 1 and d = 0
    d: Tensor | None
    line: tuple[Any, ...] = ()  # for ``again``: what ``normalised`` takes beside x


class _Statistics:
    """One at a time reads and updates running statistics: threads may share a layer."""

    lock = threading.RLock()

    @classmethod
    def renew(cls) -> None:
        cls.lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # whoever held it is not in the child
    os.register_at_fork(after_in_child=_Statistics.renew)


def forward(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and ``Saved``."""
    dense = as_dense(x)
    exact: Any = in_dtype(dense, running_mean.dtype)
    mean, var, scratch = moments(exact)
    at, rest = mean, None  # at: the mean of dense
    if x.is_cpu and is_far(mean, var):
        mean = origin(exact, mean)
        dense = centred(exact, mean)  # without rounding where x is close to its mean
        at, var, scratch = moments(dense)
        rest = at
    offset = constant(eps, var)
    std = (var + offset).sqrt_()
    with _Statistics.lock:
        batches = int(step) if step is not None and step.is_cpu else step  # on a device: no waiting for it
        r_limit, d_limit = limit_at(r_max, batches), limit_at(d_max, batches)
        running_std = (running_var + offset).sqrt_()
        r = d = None
        scale, shift = in_dtype(weight, std.dtype), in_dtype(bias, std.dtype)
        if isinstance(r_limit, Tensor) or isinstance(d_limit, Tensor) or r_limit != 1 or d_limit != 0:
            r = (std / running_std).clamp_(1 / r_limit, r_limit)
            d = mean - running_mean
            d = (d if rest is None else d.add_(rest)).div_(running_std).clamp_(-d_limit, d_limit)
            scale, shift = corrected(scale, shift, r, d)
        if momentum != 0:
            alpha = momentum if momentum > 0 else 1 / (batches + 1)
            if average_std:
                new_var = averaged(running_std, std, alpha, eps)
            else:
                count = x.numel() // x.shape[1]
                new_var = running_var.lerp(var * (count / (count - 1)), alpha)
            update(running_mean, running_var, mean if rest is None else mean + rest, new_var, alpha)
        if step is not None:
            step.fill_(batches + 1) if step.is_cpu else step.add_(1)
    rstd = std.reciprocal_()
    # Last: the passes over x put the code of the many operations on C numbers out of the caches.
    line = (scale, shift, at, var, rstd, eps)
    y = normalised(dense, line, scratch if dense.dtype == rstd.dtype else None)
    return like(y, x), Saved(mean, rest, rstd, r, d, line)


def again(x: Tensor, saved: Saved) -> Tensor:
    """y of a ``forward`` that saved these numbers, bitwise."""
    dense = as_dense(x)
    if saved.rest is not None:
        dense = centred(dense, saved.mean)
    return like(normalised(dense, saved.line), x)


def normalise(x, weight, bias, stacked):  # type: ignore[no-untyped-def]
    """y of a forward from what its operator returned, (5, C)."""
    saved = unstacked(stacked)
    weight, bias = (in_dtype(v, saved.mean.dtype) for v in (weight, bias))
    scale, shift = corrected(weight, bias, saved.r, saved.d)
    at, one = saved.mean if saved.rest is None else saved.rest, torch.ones_like(saved.mean)
    return again(x, saved._replace(line=(scale * saved.rstd, shift, at, one, one, 0.0)))


def learn(numbers, tensors, settings):  # type: ignore[no-untyped-def]
    """Update the running statistics by a forward that saved these numbers and left them as they were."""
    x, _, _, running_mean, running_var, step = tensors
    momentum, eps, _, _, average_std = settings
    mean, rest, rstd, *_ = numbers
    std, count = rstd.reciprocal(), x.numel() // x.shape[1]
    with _Statistics.lock:
        alpha = momentum if momentum > 0 else 1 / (step + 1)
        if average_std:
            new_var = averaged((running_var + eps).sqrt_(), std, alpha, eps)
        else:
            new_var = running_var.lerp((std * std - eps) * (count / (count - 1)), alpha)
        update(running_mean, running_var, mean if rest is None else mean + rest, new_var, alpha)
        if step is not None:
            step.add_(1)


def corrected(scale, shift, r, d):  # type: ignore[no-untyped-def]
    """gamma r and beta + gamma d."""
    if scale is None:
        return r, d if shift is None else d + shift
    return scale * r, scale * d if shift is None else torch.addcmul(shift, scale, d)


def normalised(dense, line, scratch=None):  # type: ignore[no-untyped-def]
    """(x - mean) / sigma * scale + shift; in ``scratch``, if there is any.

    New memory of large maps is slow: the system clears it first.
    """
    scale, shift, mean, var, rstd, eps = line
    if dense.ndim == 2 and dense.dtype == mean.dtype:
        slope = rstd if scale is None else scale * rstd  # 27 us at (256, 1024), torch's batch-norm kernel: 90
        base = (mean * slope).neg_() if shift is None else torch.addcmul(shift, mean, slope, value=-1)
        return affine(dense, base, slope)
    if scratch is None:
        return torch.native_batch_norm(dense, scale, shift, mean, var, False, 0.0, eps)[0]
    unused = {name: mean.new_empty(0) for name in ("save_mean", "save_invstd")}
    stats = (mean, var, False, 0.0, eps)
    return aten.native_batch_norm.out(dense, scale, shift, *stats, out=scratch, **unused)[0]


def inference(x, weight, bias, running_mean, running_var, eps, save):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (5, C)."""
    dense, mean = as_dense(x), running_mean
    if x.is_cpu and is_far(mean, running_var):
        dense, mean = centred(dense, mean), torch.zeros_like(mean)
    scale, shift = (in_dtype(v, mean.dtype) for v in (weight, bias))
    rstd: Any = None
    if save or dense.ndim == 2:
        rstd = (running_var + constant(eps, running_var)).rsqrt_()
    y = like(normalised(dense, (scale, shift, mean, running_var, rstd, eps)), x)
    if not save:
        return y, running_mean.new_empty(0)
    zero = torch.zeros_like(running_mean)
    return y, torch.stack((running_mean, zero, rstd, zero + 1, zero))


def stacked(saved: Saved) -> Tensor:
    """``Saved`` as the operators return it, (5, C)."""
    mean, rest, rstd, r, d, _ = saved
    zero = torch.zeros_like(mean)
    r = zero + 1 if r is None else r
    return torch.stack([zero if v is None else v for v in (mean, rest, rstd, r, d)])


def unstacked(saved: Tensor) -> Saved:
    """``Saved`` from what an operator returned."""
    mean, rest, rstd, r, d = saved.unbind()
    # There is a rest on the CPU only; elsewhere one would wait to see that.
    return Saved(mean, rest if rest.is_cpu and bool(rest.any()) else None, rstd, r, d)


def backward(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    """Gradients; r and d are constants. dgamma = r sum(dy xn) + d sum(dy), xn = (x - mean)/sigma_B."""
    mean, rest, rstd, r, d, _ = saved
    dtype = mean.dtype if weight is None else weight.dtype
    wants_vectors = needs[1] or needs[2]
    if x.numel() == 0 or not any(needs):
        vector = mean.new_zeros(x.shape[1] if wants_vectors else 0, dtype=dtype)
        return torch.zeros_like(x) if needs[0] else x.new_empty(0), vector, torch.zeros_like(vector)
    dense = as_dense(x)
    if rest is not None:
        dense, mean = centred(dense, mean), rest
    total = expanded_sum(dy) if x.is_cpu and dy.stride() != dense.stride() else None
    dy = like(dy, dense)  # torch's path for mixed layouts is slow and sums half-precision dy in half
    scale = r if weight is None else in_dtype(weight, mean.dtype) if r is None else weight * r
    if total is not None or is_wide(dense) or needs_parts(dy, dense, mean):
        exact = in_dtype(dy, mean.dtype), in_dtype(dense, mean.dtype)
        dx, dgamma, dbeta = backward_of_parts(*exact, mean, rstd, scale, training, needs[0], total)
    else:
        stats = (None if training else mean, None if training else rstd**-2, mean, rstd)
        mask = [needs[0], wants_vectors, wants_vectors]
        dx, dgamma, dbeta = aten.native_batch_norm_backward(dy, dense, scale, *stats, training, 0.0, mask)
    dx = like(dx, x) if needs[0] else x.new_empty(0)
    if not wants_vectors:
        return dx, mean.new_empty(0, dtype=dtype), mean.new_empty(0, dtype=dtype)
    if total is not None:
        dbeta = total.to(mean.dtype)
    if r is not None:
        dgamma.mul_(r).addcmul_(d, dbeta)
    return dx, in_dtype(dgamma, dtype), in_dtype(dbeta, dtype)


def is_wide(dense: Tensor) -> bool:
    if dense.ndim != 2 or dense.itemsize < 4:
        return False
    return dense.numel() >= WIDE_ELEMENTS and dense.shape[1] >= WIDE_CHANNELS


def backward_of_parts(dy, x, mean, rstd, scale, training, needs_x, total):  # type: ignore[no-untyped-def]
    """torch's batch-norm backward, with better sums:
    dx = slope (dy - mean(dy) - xn mean(dy xn)) as slope dy + k x + c."""
    dgamma, dbeta = sums(dy, x, mean, rstd)
    if total is not None:
        dbeta = total.to(mean.dtype)
    if not needs_x:
        return None, dgamma, dbeta
    slope = rstd if scale is None else scale * rstd
    if not training:
        return dy * slope.view(column(x)), dgamma, dbeta
    share = slope * (-x.shape[1] / x.numel())
    k = dgamma * rstd
    c = torch.addcmul(dbeta, k, mean, value=-1).mul_(share)
    return combined(dy, x, slope, k.mul_(share), c), dgamma, dbeta


def is_far(mean: Tensor, var: Tensor) -> bool:
    """Whether any |mean| / std is above FAR, or NaN: others may be far beside it. With eps in std, constant
    channels would not be."""
    return not float((mean * mean).sub_(var, alpha=FAR**2).max()) <= 0


def origin(dense: Tensor, mean: Tensor) -> Tensor:
    """What x is centred by: the mean or, if that may be its rounding, the first x: constants then give 0."""
    first = dense[0]
    while first.ndim > 1:
        first = first[:, 0]
    rounding = mean.abs().mul_(128 * torch.finfo(mean.dtype).eps)
    return torch.where((first - mean).abs_() <= rounding, first, mean)


def centred(dense: Tensor, mean: Tensor) -> Tensor:
    return dense - mean.view(column(dense))


def column(x: Tensor) -> list[int]:
    """The shape in which (C,) goes with x."""
    return [1, -1, *[1] * (x.ndim - 2)]


def limit_at(limit: list[float], batches: Any) -> Any:
    """The clipping limit (start, stop, begin, end) for the batch that ``batches`` came before."""
    start, stop, begin, end = limit
    if start == stop or batches is None:
        return stop
    position = (batches - begin) / (end - begin)
    position = min(max(position, 0.0), 1.0) if isinstance(batches, int) else position.clamp_(0, 1)
    return start + (stop - start) * position


def in_dtype(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return v if v is None or v.dtype == dtype else v.to(dtype)  # Tensor.to takes 1 us to see it


def averaged(running_std: Tensor, std: Tensor, alpha: Any, eps: float) -> Tensor:
    """The next running variance: (sigma + alpha (sigma_B - sigma))^2 - eps. Overwrites ``running_std``."""
    sigma = running_std.lerp_(std, alpha)
    return torch.addcmul(constant(-eps, std), sigma, sigma) if std.is_cpu else sigma * sigma - eps


def update(running_mean, running_var, mean, new_var, alpha):  # type: ignore[no-untyped-def]
    """A NaN or inf in x makes var NaN, and so new_var: that channel keeps its running statistics."""
    if new_var.is_cpu and float(new_var.dot(new_var)) < math.inf:  # the common case: all are finite
        running_mean.lerp_(mean, alpha)
        torch.clamp(new_var, 0, math.inf, out=running_var)
        return
    finite = new_var < math.inf
    torch.where(finite, running_mean.lerp(mean, alpha), running_mean, out=running_mean)
    torch.where(finite, new_var.clamp_min_(0), running_var, out=running_var)


def constant(value: float, vector: Tensor) -> Tensor:
    """``value`` for operations with ``vector``: on the CPU a tensor of its shape, which is quickest."""
    same = vector.is_cpu and vector.shape[0] <= 4096
    return _constant(value, vector.dtype, vector.shape[0] if same else None)


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, size: int | None) -> Tensor:
    with torch.inference_mode(False):
        return torch.full(() if size is None else (size,), value, dtype=dtype, device="cpu")


def as_dense(x: Tensor) -> Tensor:
    """``x`` in a memory format that torch's kernels are fast in; other layouts are copied."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the dtype of x and the strides of ``empty_like(x)``."""
    if t.stride() == x.stride() and t.dtype == x.dtype:
        return t
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() and t.dtype == x.dtype else out.copy_(t)
