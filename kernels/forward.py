"""Forward in training: one body, several ways to run it."""

import triton
import triton.language as tl

from .statistics import (
    finalise,
    load_affine,
    load_saved,
    merge,
    merge_partials,
    moments,
    renormalise,
    store_partial,
)
from .tile import (
    arrive,
    channel_range,
    length,
    load,
    locate,
    mirrored,
    split_range,
    store,
    tile_count,
)


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def forward_kernel(
    x,
    y,
    affine,
    running,
    saved,
    workspace,
    outer,
    channels,
    inner,
    settings,
    STATISTICS: tl.constexpr,
    APPLY: tl.constexpr,
    AVERAGE_STD: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = gamma * ((x - mu_B) / sigma_B * r + d) + beta, and the running statistics' update.

    x, y: (outer, channels, inner). affine: (weight (C,) or None, bias (C,) or None). running:
    (mean (C,), var (C,), step () or None). saved: (5, C), see ``finalise``. workspace:
    (partials (splits, 4, C), tickets (groups,) of zeros). settings: (momentum, eps, r ramp, d ramp).

    One program owns a channel group (axis 0): one channel, or WIDTH channels in the rows shape.

    - STATISTICS and APPLY (resident): the group is one tile, loaded once.
    - STATISTICS alone: split s (axis 1) of the group; the last split to arrive finalises.
    - APPLY alone: the same splits in reverse order, so that what was read last is found in L2.
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    if not STATISTICS:
        group, split = tl.num_programs(0) - 1 - group, tl.num_programs(1) - 1 - split
    if WIDE:
        group, split, outer = group.to(tl.int64), split.to(tl.int64), outer.to(tl.int64)
    channel, exists = channel_range(group, channels, ROWS, WIDTH)
    total = length(outer, inner, ROWS, WINDOW, VEC)
    count = outer.to(STAT) * inner.to(STAT)

    if STATISTICS and APPLY:
        offsets, inside, touched, whole = locate(
            0, total, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
        )
        t = load(x, offsets, inside, touched, STAT, WINDOW)
        mean, rest, m2 = moments(t, inside, count, ROWS)
        mean, rest, rstd, r, d = finalise(
            count, mean, rest, m2, running, saved, channel, exists, channels, settings, AVERAGE_STD
        )
        gamma, beta = load_affine(affine, channel, exists, STAT)
        store(y, offsets, renormalise(t, mean, rest, rstd, r, d, gamma, beta), inside, whole, WINDOW)
        if running[2] is not None and arrive(workspace[1], tl.num_programs(0)):
            # Others read the counter to evaluate the ramps: only the last program may write it.
            tl.store(running[2], tl.load(running[2]) + 1)
            tl.store(workspace[1], 0)

    elif STATISTICS:
        n = tl.zeros([channel.shape[0]], STAT)
        mean, rest, m2 = n, n, n
        begin, end = split_range(split, total, BLOCK)
        for start in range(begin, end, BLOCK):
            offsets, inside, touched, whole = locate(
                start, end, group, channels, inner, ROWS, WINDOW, VEC, BLOCK, WIDTH
            )
            t = load(x, offsets, inside, touched, STAT, WINDOW)
            n_t = tile_count(start, end, inside, STAT, ROWS, WINDOW, VEC, BLOCK)
            mean_t, rest_t, m2_t = moments(t, inside, n_t, ROWS)
            n, mean, rest, m2 = merge(n, mean, rest, m2, n_t, mean_t, rest_t, m2_t)
        partials, tickets = workspace
        store_partial(partials, split, n, mean, rest, m2, channel, exists, channels)
        if arrive(tickets + group, tl.num_programs(1)):
            n, mean, rest, m2 = merge_partials(partials, tl.num_programs(1), channel, exists, channels, STAT)
            finalise(count, mean, rest, m2, running, saved, channel, exists, channels, settings, AVERAGE_STD)
            tl.store(tickets + group, 0)

    else:
        mean, rest, rstd, r, d = load_saved(saved, channel, exists, channels)
        gamma, beta = load_affine(affine, channel, exists, STAT)
        begin, end = split_range(split, total, BLOCK)
        for start in range(begin, end, BLOCK):
            offsets, inside, touched, whole = locate(
                mirrored(start, begin, end, BLOCK),
                end,
                group,
                channels,
                inner,
                ROWS,
                WINDOW,
                VEC,
                BLOCK,
                WIDTH,
            )
            t = load(x, offsets, inside, touched, STAT, WINDOW)
            store(y, offsets, renormalise(t, mean, rest, rstd, r, d, gamma, beta), inside, whole, WINDOW)
        if running[2] is not None and tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
