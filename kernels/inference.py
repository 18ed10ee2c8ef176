"""Forward with the running statistics."""

import triton
import triton.language as tl

from .statistics import exact, load_affine, renormalise, store_saved
from .tile import channel_range, length, load, locate, split_range, store


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def inference_kernel(
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
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = gamma * (x - mu) / sigma + beta.

    x, y: (outer, channels, inner). affine: (weight (C,) or None, bias (C,) or None). running:
    (mean (C,), var (C,)). saved: (5, C), written where SAVE: what the backward needs. eps: a pair.

    One program owns one split (axis 1) of a channel group (axis 0).
    """
    STAT: tl.constexpr = running[0].dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    if WIDE:
        group, split, outer = group.to(tl.int64), split.to(tl.int64), outer.to(tl.int64)
    channel, exists = channel_range(group, channels, ROWS, WIDTH)
    mean = tl.load(running[0] + channel, mask=exists, other=0.0)
    var = tl.load(running[1] + channel, mask=exists, other=1.0)
    gamma, beta = load_affine(affine, channel, exists, STAT)
    rstd = 1.0 / tl.sqrt(var + exact(eps, STAT))
    zero = tl.zeros_like(mean)
    if SAVE:  # noqa: SIM102 (a constexpr and a run-time condition)
        if split == 0:
            store_saved(saved, mean, zero, rstd, zero + 1.0, zero, channel, exists, channels)
    begin, end = split_range(split, length(outer, inner, ROWS, WINDOW, VEC), BLOCK)
    for start in range(begin, end, BLOCK):
        offsets, inside, touched, whole = locate(
            start, end, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
        )
        t = load(x, offsets, inside, touched, STAT, WINDOW)
        store(y, offsets, renormalise(t, mean, zero, rstd, 1.0, zero, gamma, beta), inside, whole, WINDOW)
