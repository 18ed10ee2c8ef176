"""Backward, in training and of inference: one body, several ways to run it."""

import triton
import triton.language as tl

from .barrier import arrive, is_last, release, wait
from .statistics import load_affine
from .tile import (
    channel_range,
    channel_sum,
    edge_segments,
    edges,
    known_multiple,
    length,
    load,
    locate,
    mirrored,
    split_range,
    spread,
    store,
)


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def batch_renorm_backward_kernel(
    x,
    dy,
    dx,
    weight,
    saved,
    grads,
    workspace,
    outer,
    channels,
    inner,
    TRAINING: tl.constexpr,
    SUMS: tl.constexpr,
    APPLY: tl.constexpr,
    KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
    T: tl.constexpr,
):
    """With xn = (x - mu_B) / sigma_B, and r and d constants:

    dbeta = sum(dy)             dgamma = r * sum(dy * xn) + d * dbeta
    dx = gamma r / sigma_B * (dy - mean(dy) - xn * mean(dy * xn))       in training
    dx = gamma / sigma * dy                                             of inference

    x, dy, dx: (outer, channels, inner). weight: (C,) or None. saved: (5, C), of the forward. grads:
    (dgamma (C,), dbeta (C,)), or (None, None) where nobody wants them. workspace: (partials
    (splits, 2, C), published (3, C), words (1 + groups,), of which the first is the forward's).

    Programs own what they own in the forward, and KEEP and SPLIT mean what they mean there. SUMS and
    APPLY in training are one launch, or SUMS alone, then APPLY alone. Of inference, dx needs no sum:
    both are done in one pass, and no program waits.
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    partials, published, words = workspace
    split, splits = tl.program_id(1), tl.num_programs(1)
    channels = known_multiple(channels, T)
    groups = tl.cdiv(channels, T.channels)
    count = outer.to(STAT) * inner.to(STAT)
    if T.wide:
        split, outer = split.to(tl.int64), outer.to(tl.int64)
    if not SUMS:
        split = splits - 1 - split
    begin, end = split_range(split, splits, length(outer, inner, T), T)

    for turn in range(tl.program_id(0), groups, tl.num_programs(0)):
        group = turn if SUMS else groups - 1 - turn
        if T.wide:
            group = group.to(tl.int64)
        channel, exists = channel_range(group, channels, T)
        mean = spread(tl.load(saved + channel, mask=exists, other=0.0), inner, T)
        a, k, c = tl.zeros([1], STAT), tl.zeros([1], STAT), tl.zeros([1], STAT)
        if not TRAINING:
            rstd = tl.load(saved + 2 * channels + channel, mask=exists, other=0.0)
            a = spread(load_affine((weight, None), channel, exists, STAT)[0] * rstd, inner, T)

        if SUMS:
            if KEEP:
                place = locate(begin, end, group, channels, inner, T)
                g = load(dy, place, STAT, "")
                t = load(x, place, STAT, "")
                sum_g = channel_sum(g, inner, T)
                sum_gx = channel_sum(g * (t - mean), inner, T)
                if T.edges:
                    first, _ = edge_segments(begin, end, inner, T)
                    e_place = edges(first, begin, end, group, channels, inner, T)
                    e_g = load(dy, e_place, STAT, "")
                    e_t = load(x, e_place, STAT, "")
                    sum_g += channel_sum(e_g, inner, T)
                    sum_gx += channel_sum(e_g * (e_t - mean), inner, T)
            else:
                sum_g, sum_gx = sums_of_split(
                    x, dy, dx, begin, end, group, channels, inner, mean, a, TRAINING, APPLY, STAT, T
                )
            if SPLIT:
                p = partials + split * 2 * channels + channel
                tl.store(p, sum_g, mask=exists)
                tl.store(p + channels, sum_gx, mask=exists)
                word = words + 1 + group
                found = arrive(word)
                if is_last(found, splits):
                    sums = add_partials(partials, splits, channel, exists, channels, STAT, T)
                    a_, k_, c_ = conclude(count, sums, weight, saved, grads, channel, exists, channels)
                    if TRAINING:
                        tl.store(published + channel, a_, mask=exists)
                        tl.store(published + channels + channel, k_, mask=exists)
                        tl.store(published + 2 * channels + channel, c_, mask=exists)
                    release(word, found)
                elif APPLY and TRAINING:
                    wait(word, found)
            else:
                sums = (sum_g, sum_gx)
                a, k, c = conclude(count, sums, weight, saved, grads, channel, exists, channels)

        if APPLY:
            if TRAINING:
                if SPLIT:
                    tl.debug_barrier()
                    a = tl.load(published + channel, mask=exists, other=0.0)
                    k = tl.load(published + channels + channel, mask=exists, other=0.0)
                    c = tl.load(published + 2 * channels + channel, mask=exists, other=0.0)
                a, k, c = spread(a, inner, T), spread(k, inner, T), spread(c, inner, T)
            if KEEP:
                store(dx, place, g * a + ((t - mean) * k + c))
                if T.edges:
                    store(dx, e_place, e_g * a + ((e_t - mean) * k + c))
            elif TRAINING or not SUMS:
                apply_to_split(
                    x, dy, dx, begin, end, group, channels, inner, mean, a, k, c, TRAINING, STAT, T
                )


@triton.jit
def sums_of_split(
    x,
    dy,
    dx,
    begin,
    end,
    group,
    channels,
    inner,
    mean,
    a,
    TRAINING: tl.constexpr,
    APPLY: tl.constexpr,
    STAT: tl.constexpr,
    T: tl.constexpr,
):
    """sum(dy) and sum(dy * (x - mean)) of the rows or vectors [begin, end) of a group. Of inference, dx
    needs neither, and is stored in passing."""
    KEPT: tl.constexpr = "evict_last" if TRAINING and APPLY else ""
    tile_g = tl.full([T.block, T.width], 0.0, STAT)
    tile_gx = tile_g
    for start in tl.range(begin, end, T.block, num_stages=T.stages):
        place = locate(start, end, group, channels, inner, T)
        g = load(dy, place, STAT, KEPT)
        t = load(x, place, STAT, KEPT)
        tile_g += g
        tile_gx += g * (t - mean)
        if APPLY and not TRAINING:
            store(dx, place, g * a)
    sum_g, sum_gx = channel_sum(tile_g, inner, T), channel_sum(tile_gx, inner, T)
    if T.edges:
        first, last = edge_segments(begin, end, inner, T)
        for segment in range(first, last, T.segments):
            e_place = edges(segment, begin, end, group, channels, inner, T)
            g = load(dy, e_place, STAT, KEPT)
            t = load(x, e_place, STAT, KEPT)
            sum_g += channel_sum(g, inner, T)
            sum_gx += channel_sum(g * (t - mean), inner, T)
            if APPLY and not TRAINING:
                store(dx, e_place, g * a)
    return sum_g, sum_gx


@triton.jit
def apply_to_split(
    x,
    dy,
    dx,
    begin,
    end,
    group,
    channels,
    inner,
    mean,
    a,
    k,
    c,
    TRAINING: tl.constexpr,
    STAT: tl.constexpr,
    T: tl.constexpr,
):
    """dx for the rows or vectors [begin, end) of a group, the last tile first."""
    if T.edges:
        first, last = edge_segments(begin, end, inner, T)
        for segment in range(first, last, T.segments):
            e_place = edges(segment, begin, end, group, channels, inner, T)
            apply_to_tile(x, dy, dx, e_place, mean, a, k, c, TRAINING, STAT)
    for start in tl.range(begin, end, T.block, num_stages=T.stages):
        place = locate(mirrored(start, begin, end, T), end, group, channels, inner, T)
        apply_to_tile(x, dy, dx, place, mean, a, k, c, TRAINING, STAT)


@triton.jit
def apply_to_tile(x, dy, dx, place, mean, a, k, c, TRAINING: tl.constexpr, STAT: tl.constexpr):
    """dx from x and dy, which are read for the last time."""
    value = load(dy, place, STAT, "evict_first") * a
    if TRAINING:
        value += (load(x, place, STAT, "evict_first") - mean) * k + c
    store(dx, place, value)


@triton.jit
def conclude(count, sums, weight, saved, grads, channel, exists, channels):
    """From the sums of dy and dy * (x - mean): dgamma and dbeta, stored, and a, k, c of
    dx = dy * a + ((x - mean) * k + c) = gamma r / sigma_B * (dy - mean(dy) - xn * mean(dy * xn))."""
    STAT: tl.constexpr = saved.dtype.element_ty
    rest = tl.load(saved + channels + channel, mask=exists, other=0.0)
    rstd = tl.load(saved + 2 * channels + channel, mask=exists, other=0.0)
    r = tl.load(saved + 3 * channels + channel, mask=exists, other=0.0)
    gamma, _ = load_affine((weight, None), channel, exists, STAT)
    sum_g, sum_gx = sums
    sum_gx = (sum_gx - rest * sum_g) * rstd
    dweight, dbias = grads
    if dweight is not None:
        d = tl.load(saved + 4 * channels + channel, mask=exists, other=0.0)
        tl.store(dweight + channel, (r * sum_gx + d * sum_g).to(dweight.dtype.element_ty), mask=exists)
        tl.store(dbias + channel, sum_g.to(dbias.dtype.element_ty), mask=exists)
    a = gamma * r * rstd
    k = -a * rstd * (sum_gx / count)
    return a, k, -(a * (sum_g / count) + rest * k)


@triton.jit
def add_partials(partials, splits, channel, exists, channels, STAT: tl.constexpr, T: tl.constexpr):
    """The sums over all splits, always in the same order: results are repeatable."""
    sum_g = tl.zeros([channel.shape[0]], STAT)
    sum_gx = sum_g
    for first in range(0, splits, T.piece):
        split = first + tl.arange(0, T.piece)[:, None]
        mask = (split < splits) & exists[None, :]
        p = partials + split * 2 * channels + channel[None, :]
        sum_g += tl.sum(tl.load(p, mask=mask, other=0.0), 0)
        sum_gx += tl.sum(tl.load(p + channels, mask=mask, other=0.0), 0)
    return sum_g, sum_gx
