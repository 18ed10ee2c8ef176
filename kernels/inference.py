"""Forward with the running statistics, or again with those of a batch."""

import triton
import triton.language as tl

from .forward import normalise_split
from .statistics import exact, line, load_affine, load_saved, store_saved
from .tile import channel_range, known_multiple, length, split_range, spread


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def batch_renorm_inference_kernel(
    x,
    y,
    affine,
    running,
    saved,
    outer,
    channels,
    inner,
    eps,
    SAVE: tl.constexpr,
    T: tl.constexpr,
):
    """y = gamma * (x - mu) / sigma + beta, or y of a training forward from what it saved.

    x, y: (outer, channels, inner). affine: (weight (C,) or None, bias (C,) or None). running:
    (mean (C,), var (C,)), or (None, None): from saved (5, C). SAVE: to saved, for the backward. eps: a pair.

    One program owns one split (axis 1) of a channel group (axis 0).
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    if T.wide:
        group, split, outer = group.to(tl.int64), split.to(tl.int64), outer.to(tl.int64)
    channels = known_multiple(channels, T)
    channel, exists = channel_range(group, channels, T)
    gamma, beta = load_affine(affine, channel, exists, STAT)
    running_mean, running_var = running
    if running_mean is None:
        mean, rest, rstd, r, d = load_saved(saved, channel, exists, channels)
        a, b = line(rest, rstd, r, d, gamma, beta)
    else:
        mean = tl.load(running_mean + channel, mask=exists, other=0.0)
        var = tl.load(running_var + channel, mask=exists, other=1.0)
        rstd = 1.0 / tl.sqrt(var + exact(eps, STAT))
        zero = tl.zeros_like(mean)
        if SAVE:  # noqa: SIM102 (a constexpr and a run-time condition)
            if split == 0:
                store_saved(saved, mean, zero, rstd, zero + 1.0, zero, channel, exists, channels)
        a, b = line(zero, rstd, 1.0, zero, gamma, beta)
    mean, a, b = spread(mean, inner, T), spread(a, inner, T), spread(b, inner, T)
    begin, end = split_range(split, tl.num_programs(1), length(outer, inner, T), T)
    normalise_split(x, y, begin, end, group, channels, inner, mean, a, b, STAT, T)
