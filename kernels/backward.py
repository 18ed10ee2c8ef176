"""Backward, in training and of inference: one body, several ways to run it."""

import triton
import triton.language as tl

from .statistics import load_affine, load_saved
from .tile import (
    arrive,
    channel_range,
    channel_sum,
    length,
    load,
    locate,
    mirrored,
    split_range,
    store,
)

#: Splits summed at a time, see statistics.PIECE.
PIECE = tl.constexpr(32)


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def backward_kernel(
    x,
    dy,
    dx,
    affine,
    saved,
    grads,
    workspace,
    outer,
    channels,
    inner,
    TRAINING: tl.constexpr,
    SUMS: tl.constexpr,
    APPLY: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """With xn = (x - mu_B) / sigma_B, and r and d constants:

    dbeta = sum(dy)             dgamma = r * sum(dy * xn) + d * dbeta
    dx = gamma r / sigma_B * (dy - mean(dy) - xn * mean(dy * xn))       in training
    dx = gamma / sigma * dy                                             of inference

    x, dy, dx: (outer, channels, inner). affine: (weight (C,) or None, None). saved: (5, C), of the
    forward. grads: (dgamma (C,), dbeta (C,)), or (None, None) where nobody wants them. workspace:
    (partials (splits + 1, 2, C), tickets (groups,) of zeros).

    One program owns a channel group (axis 0): one channel, or WIDTH channels in the rows shape.

    - SUMS and APPLY in training (resident): the group is one tile of x and of dy, loaded once.
    - SUMS alone: split s (axis 1); the last split to arrive adds the sums up, in a fixed order,
      and publishes the total as the partial after the last.
    - APPLY alone: the same splits in reverse order, so that what was read last is found in L2.
    - SUMS and APPLY of inference: dx needs no sum, so splits do both in one pass.
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    if not SUMS:
        group, split = tl.num_programs(0) - 1 - group, splits - 1 - split
    if WIDE:
        group, split, outer = group.to(tl.int64), split.to(tl.int64), outer.to(tl.int64)
    channel, exists = channel_range(group, channels, ROWS, WIDTH)
    total = length(outer, inner, ROWS, WINDOW, VEC)
    count = outer.to(STAT) * inner.to(STAT)
    mean, rest, rstd, r, d = load_saved(saved, channel, exists, channels)
    gamma, _ = load_affine(affine, channel, exists, STAT)
    partials, tickets = workspace

    if TRAINING and SUMS and APPLY:
        offsets, inside, touched, whole = locate(
            0, total, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
        )
        g = load(dy, offsets, inside, touched, STAT, WINDOW)
        t = load(x, offsets, inside, touched, STAT, WINDOW)
        sum_g = channel_sum(g, ROWS)
        sum_gx = channel_sum(g * normalised(t, mean, rest, rstd), ROWS)
        store_grads(grads, sum_g, sum_gx, r, d, channel, exists)
        value = gradient(t, g, mean, rest, rstd, gamma * r, sum_g / count, sum_gx / count)
        store(dx, offsets, value, inside, whole, WINDOW)

    elif SUMS:
        tile_g = tl.zeros([BLOCK, WIDTH], STAT)
        tile_gx = tl.zeros([BLOCK, WIDTH], STAT)
        begin, end = split_range(split, total, BLOCK)
        for start in range(begin, end, BLOCK):
            offsets, inside, touched, whole = locate(
                start, end, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
            )
            g = load(dy, offsets, inside, touched, STAT, WINDOW)
            t = load(x, offsets, inside, touched, STAT, WINDOW)
            tile_g += g
            tile_gx += g * normalised(t, mean, rest, rstd)
            if APPLY:
                store(dx, offsets, g * (gamma * rstd), inside, whole, WINDOW)
        sum_g, sum_gx = channel_sum(tile_g, ROWS), channel_sum(tile_gx, ROWS)
        p = partials + split * 2 * channels + channel
        tl.store(p, sum_g, mask=exists)
        tl.store(p + channels, sum_gx, mask=exists)
        if arrive(tickets + group, splits):
            sum_g, sum_gx = add_partials(partials, splits, channel, exists, channels, STAT)
            store_grads(grads, sum_g, sum_gx, r, d, channel, exists)
            p = partials + splits * 2 * channels + channel
            tl.store(p, sum_g, mask=exists)
            tl.store(p + channels, sum_gx, mask=exists)
            tl.store(tickets + group, 0)

    else:
        mean_g, mean_gx = tl.zeros([1], STAT), tl.zeros([1], STAT)
        if TRAINING:
            p = partials + splits * 2 * channels + channel
            mean_g = tl.load(p, mask=exists, other=0.0) / count
            mean_gx = tl.load(p + channels, mask=exists, other=0.0) / count
        begin, end = split_range(split, total, BLOCK)
        for start in range(begin, end, BLOCK):
            at = mirrored(start, begin, end, BLOCK)
            offsets, inside, touched, whole = locate(
                at, end, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
            )
            g = load(dy, offsets, inside, touched, STAT, WINDOW)
            if TRAINING:
                t = load(x, offsets, inside, touched, STAT, WINDOW)
                value = gradient(t, g, mean, rest, rstd, gamma * r, mean_g, mean_gx)
            else:
                value = g * (gamma * rstd)
            store(dx, offsets, value, inside, whole, WINDOW)


@triton.jit
def normalised(t, mean, rest, rstd):
    """xn = (t - mean - rest) / sigma_B."""
    return (t - mean) * rstd - rest * rstd


@triton.jit
def gradient(t, g, mean, rest, rstd, gamma_r, mean_g, mean_gx):
    """gamma r / sigma_B * (g - mean(g) - xn * mean(g xn)): a subtraction and two FMAs per element."""
    a = gamma_r * rstd
    k = -a * rstd * mean_gx
    return g * a + ((t - mean) * k - (a * mean_g + rest * k))


@triton.jit
def store_grads(grads, sum_g, sum_gx, r, d, channel, exists):
    """dgamma = r sum(dy xn) + d sum(dy), dbeta = sum(dy)."""
    dweight, dbias = grads
    if dweight is not None:
        tl.store(dweight + channel, (r * sum_gx + d * sum_g).to(dweight.dtype.element_ty), mask=exists)
        tl.store(dbias + channel, sum_g.to(dbias.dtype.element_ty), mask=exists)


@triton.jit
def add_partials(partials, splits, channel, exists, channels, STAT: tl.constexpr):
    """The sums over all splits, always in the same order: results are repeatable."""
    sum_g = tl.zeros([channel.shape[0]], STAT)
    sum_gx = sum_g
    for first in range(0, splits, PIECE):
        split = first + tl.arange(0, PIECE)[:, None]
        mask = (split < splits) & exists[None, :]
        p = partials + split * 2 * channels + channel[None, :]
        sum_g += tl.sum(tl.load(p, mask=mask, other=0.0), 0)
        sum_gx += tl.sum(tl.load(p + channels, mask=mask, other=0.0), 0)
    return sum_g, sum_gx
