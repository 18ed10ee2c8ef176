"""Batch Renormalization in plain PyTorch: what CPU users run, and the first oracle of the kernels.

torch's own normalisation kernels do the passes over x: given mu_B and sigma_B, Algorithm 1 is batch
norm with the weight gamma*r and the bias beta + gamma*d. The rest works on C numbers, where an operation
costs 1.5 us, and 4 us if it takes a Python number: small inputs are as fast as these are few. Hence the
in-place forms and ``constant``.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

aten = torch.ops.aten

#: |mean| / std from which x is centred first. torch's kernels compute x * a + b, which loses there what
#: float32 has left: at mean 1e4, std 1e-2 BatchNorm's own y is off by 3 %. It costs two passes more.
FAR = 1000.0
#: |mean| / std up to which x * a + b is as exact in the backward as torch's kernels, which centre x there;
#: elements and channels of (N, C) from which it is quicker (measured up to 2**22 elements).
NEAR, WIDE_ELEMENTS, WIDE_CHANNELS = 32.0, 2**18, 128


class Saved(NamedTuple):
    """What backward takes beside x and weight, each (C,)."""

    mean: Tensor
    rest: Tensor | None  # what rounding took from the mean; None: nothing
    rstd: Tensor  # 1 / sigma_B
    r: Tensor
    d: Tensor
    scale: Tensor  # gamma * r
    wide: bool  # whether ``wide_backward`` is right, and quicker than torch's own kernel
    line: tuple[Any, ...] = ()  # for ``again``: what ``normalised`` takes beside x


def forward(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and ``Saved``."""
    dense = as_dense(x)
    mean, var, scratch = moments(dense, running_mean)
    offset = constant(eps, var)
    std = (var + offset).sqrt_()
    at, rest, near = mean, None, False  # at: the mean of dense
    if x.is_cpu and x.dtype == mean.dtype:
        ratio = mean / std
        squares = float(ratio.dot(ratio))  # says in one number of all channels that they are near, or not far
        near = squares <= NEAR**2
        if not squares <= FAR**2 and is_far(ratio):
            dense = centred(dense, mean)  # exact, for x is close to its mean
            at, var, scratch = moments(dense, running_mean)
            rest, std = at, (var + offset).sqrt_()
    running_std = (running_var + offset).sqrt_()
    batches = int(step) if step is not None and step.is_cpu else step  # on a device: no waiting for it
    r_limit, d_limit = limit_at(r_max, batches), limit_at(d_max, batches)
    r = (std / running_std).clamp_(1 / r_limit, r_limit)
    d = mean - running_mean
    d = (d if rest is None else d.add_(rest)).div_(running_std).clamp_(-d_limit, d_limit)

    if weight is None:
        scale, shift = r, d if bias is None else d + bias
    else:
        scale, shift = weight * r, weight * d if bias is None else torch.addcmul(bias, weight, d)
    alpha = momentum if momentum >= 0 else 1 / (batches + 1)
    if average_std:
        new_var = averaged(running_std, std, alpha, eps)
    else:
        count = x.numel() // x.shape[1]
        new_var = running_var.lerp(var * (count / (count - 1)), alpha)
    update(running_mean, running_var, mean, new_var, alpha)
    if step is not None:
        step.fill_(batches + 1) if step.is_cpu else step.add_(1)
    rstd, wide = std.reciprocal(), False
    if dense.ndim == 2 and dense.dtype == rstd.dtype:
        wide = near and x.numel() >= WIDE_ELEMENTS and x.shape[1] >= WIDE_CHANNELS
    line = (scale, shift, at, var, rstd, eps)
    # Last: the passes over x put the code of the many operations on C numbers out of the caches.
    y = normalised(dense, line, scratch)
    return like(y, x), Saved(mean, rest, rstd, r, d, scale, wide, line)


def normalised(dense, line, scratch=None):  # type: ignore[no-untyped-def]
    """y of ``forward``."""
    scale, shift, at, var, rstd, eps = line
    if dense.ndim == 2 and dense.dtype == rstd.dtype:  # 27 us at (256, 1024), torch's batch-norm kernel: 90
        slope = scale * rstd
        return torch.addcmul(torch.addcmul(shift, at, slope, value=-1), dense, slope)
    return applied(dense, scale, shift, at, var, eps, scratch)


def again(x: Tensor, saved: Saved) -> Tensor:
    """y of a ``forward`` that saved these numbers, bitwise."""
    dense = as_dense(x)
    if saved.rest is not None:
        dense = centred(dense, saved.mean)
    return like(normalised(dense, saved.line), x)


def batch_norm(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """``forward`` while r = 1 and d = 0: torch's batch norm and its autograd, the quickest for small inputs.

    Returns y, or None where it cannot serve; the running statistics are then as they were.
    """
    batches: Any = None if step is None else int(step)
    if limit_at(d_max, batches) != 0 or limit_at(r_max, batches) != 1 or not average_std:
        return None
    if not torch_serves(x, weight, bias, running_mean, eps):
        return None
    y, mean, rstd = batch_norm_again(x, weight, bias, eps)
    with _AutoDispatchBelowAutograd():
        ratio = mean * rstd
        if not float(ratio.dot(ratio)) <= FAR**2:
            return None
        running_std = (running_var + constant(eps, mean)).sqrt_()
        alpha = momentum if momentum >= 0 else 1 / (batches + 1)
        update(running_mean, running_var, mean, averaged(running_std, rstd.reciprocal(), alpha, eps), alpha)
        if step is not None:
            step.fill_(batches + 1)
    return y


def batch_norm_again(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    """torch's batch norm, without running statistics; y, mean and 1 / sigma_B."""
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)


def torch_serves(x, weight, bias, running_mean, eps) -> bool:  # type: ignore[no-untyped-def]
    """Whether torch's batch norm is right for such a batch, and the quickest."""
    if any(t is not None and t.dtype != running_mean.dtype for t in (x, weight, bias)):
        return False
    if x.ndim > 3 and 1 in x.shape:  # its backward takes dy for channels_last where dx is not
        return False
    if eps == 0 or (weight is None and bias is not None):  # constant channels; double backward
        return False
    return as_dense(x) is x and not has_planes(x, running_mean)


def inference(x, weight, bias, running_mean, running_var, eps, save):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (5, C)."""
    scale, shift = (in_dtype(v, running_mean.dtype) for v in (weight, bias))
    stats = (running_mean, running_var, False, 0.0, eps)
    y = like(torch.native_batch_norm(as_dense(x), scale, shift, *stats)[0], x)
    if not save:
        return y, running_mean.new_empty(0)
    zero = torch.zeros_like(running_mean)
    return y, torch.stack((running_mean, zero, (running_var + eps).rsqrt_(), zero + 1, zero))


def stacked(saved: Saved) -> Tensor:
    """``Saved`` as the operators return it, (5, C)."""
    mean, rest, rstd, r, d, *_ = saved
    return torch.stack((mean, torch.zeros_like(mean) if rest is None else rest, rstd, r, d))


def unstacked(saved: Tensor, weight: Tensor | None) -> Saved:
    """``Saved`` from what an operator returned."""
    mean, rest, rstd, r, d = saved.unbind()
    scale = r if weight is None else weight * r
    # There is a rest on the CPU only; elsewhere one would wait to see that.
    return Saved(mean, rest if rest.is_cpu and bool(rest.any()) else None, rstd, r, d, scale, False)


def backward(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    """Gradients; r and d are constants. dgamma = r sum(dy xn) + d sum(dy), xn = (x - mean)/sigma_B."""
    mean, rest, rstd, r, d, scale, wide, _ = saved
    dtype = mean.dtype if weight is None else weight.dtype
    wants_vectors = needs[1] or needs[2]
    if x.numel() == 0 or not any(needs):
        vector = mean.new_zeros(x.shape[1] if wants_vectors else 0, dtype=dtype)
        return torch.zeros_like(x) if needs[0] else x.new_empty(0), vector, torch.zeros_like(vector)
    dense = as_dense(x)
    if rest is not None:
        dense, mean = centred(dense, mean), rest
    dy = like(dy, dense)  # torch's path for mixed layouts is slow and sums half-precision dy in half
    if wide and needs[0]:
        dx, dgamma, dbeta = wide_backward(dy, dense, mean, rstd, scale * rstd)
    else:
        stats = (None if training else mean, None if training else rstd**-2, mean, rstd)
        mask = [needs[0], wants_vectors, wants_vectors]
        dx, dgamma, dbeta = aten.native_batch_norm_backward(dy, dense, scale, *stats, training, 0.0, mask)
    dx = like(dx, x) if needs[0] else x.new_empty(0)
    if not wants_vectors:
        return dx, mean.new_empty(0, dtype=dtype), mean.new_empty(0, dtype=dtype)
    dgamma.mul_(r).addcmul_(d, dbeta)
    return dx, in_dtype(dgamma, dtype), in_dtype(dbeta, dtype)


def wide_backward(dy, x, mean, rstd, slope):  # type: ignore[no-untyped-def]
    """torch's batch-norm backward of (N, C) in training, up to 15 % quicker: its sums, then
    dx = slope (dy - mean(dy) - xn mean(dy xn)) as slope dy + k x + c."""
    sums = [False, True, True]
    _, dgamma, dbeta = aten.native_batch_norm_backward(dy, x, None, None, None, mean, rstd, True, 0.0, sums)
    share = slope * (-1 / x.shape[0])
    k = dgamma * rstd
    c = torch.addcmul(dbeta, k, mean, value=-1).mul_(share)
    return torch.addcmul(c, x, k.mul_(share)).addcmul_(dy, slope), dgamma, dbeta


def moments(dense: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean and the biased variance of each channel, in the dtype of the running statistics.

    Third, scratch memory of the size of ``dense`` that they leave, or None.
    """
    if has_planes(dense, running_mean):
        return moments_of_planes(dense)
    # torch takes the dtype of its results from the running statistics that it updates.
    same = dense.dtype == running_mean.dtype
    updated = (None, None) if same else (torch.empty_like(running_mean),) * 2
    mean, var = torch.batch_norm_update_stats(dense, *updated, 1.0)  # type: ignore[call-arg]
    return mean, var, None


def has_planes(dense: Tensor, running_mean: Tensor) -> bool:
    """Whether group norm is the quicker way to the moments: of contiguous maps, not too small."""
    if dense.ndim == 2 or not dense.is_cpu or dense.dtype != running_mean.dtype or not dense.is_contiguous():
        return False
    elements = dense.numel()
    return elements >= 2**16 and elements >= 32 * dense.shape[0] * dense.shape[1]


def moments_of_planes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's group norm, whose sums are vectorised: those of batch norm take four times as long.

    Its groups are single planes; their moments are merged by Chan, Golub and LeVeque's formula (1979).
    """
    n, c = x.shape[:2]
    planes = x.view(n, c, -1)  # of three axes: else torch takes one channel for channels_last, less exactly
    scratch, means, rstds = torch.native_group_norm(planes, None, None, n, c, planes.shape[2], c, 0.0)
    mean = means.mean(0)
    deviations = means.sub_(mean)
    var = rstds.pow_(-2).addcmul_(deviations, deviations).mean(0)
    return mean, var, scratch.as_strided_(x.shape, x.stride())  # in place: y must be nobody's view


def applied(x, scale, shift, mean, var, eps, scratch):  # type: ignore[no-untyped-def]
    """(x - mean) / sqrt(var + eps) * scale + shift; in ``scratch``, if there is any.

    New memory of large maps is slow: the system clears it first.
    """
    if scratch is None:
        return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]
    unused = {name: scale.new_empty(0) for name in ("save_mean", "save_invstd")}
    return aten.native_batch_norm.out(x, scale, shift, mean, var, False, 0.0, eps, out=scratch, **unused)[0]


def is_far(ratio: Tensor) -> bool:
    """Whether any |mean| / std is above FAR; where one channel is NaN, others may be."""
    return not float(ratio.abs().max()) <= FAR


def centred(dense: Tensor, mean: Tensor) -> Tensor:
    return dense - mean.view(1, -1, *[1] * (dense.ndim - 2))


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
    """``t`` with the strides of ``empty_like(x)``."""
    if t.stride() == x.stride():
        return t
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
