"""Batch Renormalization in plain PyTorch: what CPU users run, and the first oracle of the kernels.

torch's own native batch-norm kernels do the passes over x. Given mu_B and sigma_B, Algorithm 1 is
batch norm with the weight gamma*r and the bias beta + gamma*d.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def forward(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and saved (4, C)."""
    channels = x.shape[1]
    if x.numel() == 0:
        return torch.empty_like(x), running_mean.new_zeros((4, channels))
    unbiased = torch.empty_like(running_var)
    mean, var = torch.batch_norm_update_stats(x, torch.empty_like(running_mean), unbiased, 1.0)
    std = (var + eps).sqrt_()
    running_std = (running_var + eps).sqrt_()
    r_max, d_max = limit_at(r_max, step, std), limit_at(d_max, step, std)
    r = (std / running_std).clamp_(1 / r_max, r_max)
    d = ((mean - running_mean) / running_std).clamp_(-d_max, d_max)

    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    shift = shift if bias is None else shift + bias
    y = like(aten.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0], x)

    alpha = momentum if momentum >= 0 else 1 / (step + 1).to(std.dtype)
    finite = torch.isfinite(mean + var)
    target = averaged_variance(running_var, var, running_std, std, alpha, eps) if average_std else unbiased
    running_var.copy_(torch.where(finite, target if average_std else running_var.lerp(target, alpha), running_var))
    running_mean.copy_(torch.where(finite, running_mean.lerp(mean, alpha), running_mean))
    if step is not None:
        step += 1
    return y, torch.stack((mean, 1 / std, r, d))


def inference(x, weight, bias, running_mean, running_var, eps, save):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (4, C)."""
    stats = running_mean.dtype
    scale, shift = (None if v is None else v.to(stats) for v in (weight, bias))
    y = like(aten.native_batch_norm(x, scale, shift, running_mean, running_var, False, 0.0, eps)[0], x)
    if not save:
        return y, running_mean.new_empty(0)
    one = torch.ones_like(running_mean)
    return y, torch.stack((running_mean, (running_var + eps).rsqrt_(), one, torch.zeros_like(one)))


def backward(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    """Gradients; r and d are constants. dgamma = r sum(dy xn) + d sum(dy), xn = (x - mean)/sigma_B."""
    mean, rstd, r, d = saved
    scale = r if weight is None else weight * r
    wants_vectors = needs[1] or needs[2]
    mask = [needs[0], wants_vectors, wants_vectors]
    if training:
        stats = (None, None, mean, rstd)
    else:
        stats = (mean, rstd**-2, None, None)
    dx, dxn, dbias = aten.native_batch_norm_backward(dy, x, scale, *stats, training, 0.0, mask)
    dx = like(dx, x) if needs[0] else x.new_empty(0)
    vector = saved.dtype if weight is None else weight.dtype
    if not wants_vectors:
        return dx, saved.new_empty(0, dtype=vector), saved.new_empty(0, dtype=vector)
    return dx, (r * dxn + d * dbias).to(vector), dbias.to(vector)


def limit_at(limit: list[float], step: Tensor | None, like: Tensor) -> Tensor | float:
    """The clipping limit (start, stop, begin, end) for the batch after ``step`` batches."""
    start, stop, begin, end = limit
    if start == stop or step is None:
        return stop
    return start + (stop - start) * ((step.to(like.dtype) - begin) / max(end - begin, 1)).clamp_(0, 1)


def averaged_variance(v: Tensor, v_b: Tensor, std: Tensor, std_b: Tensor, alpha: Tensor | float, eps: float) -> Tensor:
    """(sigma + alpha (sigma_B - sigma))^2 - eps, without the cancellation of eps: never negative."""
    keep = 1 - alpha
    cross = (v * v_b + eps * (v + v_b)) / (std * std_b + eps)  # sigma sigma_B - eps
    return keep * keep * v + alpha * alpha * v_b + 2 * alpha * keep * cross


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the strides of ``empty_like(x)``; torch's kernels know two memory formats only."""
    if t.stride() == x.stride():
        return t
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
