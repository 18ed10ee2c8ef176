"""Forward in training: one body, several ways to run it."""

import triton
import triton.language as tl

from .barrier import arrive, is_last, release, wait
from .statistics import (
    centred_moments,
    count_batch,
    finalise,
    load_running,
    merge,
    merge_partials,
    moments,
    moments_of_places,
    settled,
    store_partial,
    two_sum,
    welford,
)
from .tile import (
    anchor,
    channel_range,
    channel_sum,
    counted,
    edge_segments,
    edges,
    known_multiple,
    length,
    load,
    locate,
    mirrored,
    rows_or_vectors,
    split_range,
    spread,
    store,
)


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def batch_renorm_forward_kernel(
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
    KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
    AVERAGE_STD: tl.constexpr,
    T: tl.constexpr,
):
    """y = gamma * ((x - mu_B) / sigma_B * r + d) + beta, and the running statistics' update.

    x, y: (outer, channels, inner). affine: (weight (C,) or None, bias (C,) or None). running:
    (mean (C,), var (C,), step () or None). saved: (5, C), see ``finalise``. workspace:
    (partials (splits, 3, C), published (2, C), words (1 + groups,): one for ``count_batch``, then one
    a group, see barrier.py). settings: (momentum, eps, r ramp, d ramp). T: see tile.py.

    A program owns one split (axis 1) of a channel group, then of the next group: as many groups at a
    time as axis 0 has programs.

    - KEEP (resident, cluster, cooperative): its split is one tile, loaded once and kept until it is stored.
      Otherwise (blocked, two_launch) it walks through tiles, to read them again in reverse order, so
      that what was read last is found in L2.
    - SPLIT: the splits of a group hand in their moments; the last to arrive finalises and publishes
      what the others wait for (cooperative, blocked) or the next launch reads (two_launch).
      Otherwise (resident, cluster) one program has the whole group.
    - STATISTICS alone, then APPLY alone: two_launch.
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    partials, published, words = workspace
    split, splits = tl.program_id(1), tl.num_programs(1)
    channels = known_multiple(channels, T)
    groups = tl.cdiv(channels, T.channels)
    count = outer.to(STAT) * inner.to(STAT)
    if T.wide:
        split, outer = split.to(tl.int64), outer.to(tl.int64)
    if not STATISTICS:
        split = splits - 1 - split
    total = length(outer, inner, T)
    begin, end = split_range(split, splits, total, T)

    for turn in range(tl.program_id(0), groups, tl.num_programs(0)):
        group = turn if STATISTICS else groups - 1 - turn
        if T.wide:
            group = group.to(tl.int64)
        channel, exists = channel_range(group, channels, T)

        if STATISTICS:
            if not SPLIT:  # read before, written after the reductions, which all of a cluster takes part in
                old = load_running(running, channel, exists, STAT)
            if KEEP:
                n = count
                if SPLIT:
                    n = tl.maximum(counted(begin, end, group, channels, inner, T), 1).to(STAT)
                place = locate(begin, end, group, channels, inner, T)
                t = load(x, place, STAT, "")
                e, e_place = t, place
                if T.edges:
                    first, _ = edge_segments(begin, end, inner, T)
                    e_place = edges(first, begin, end, group, channels, inner, T)
                    e = load(x, e_place, STAT, "")
                known = anchor(x, begin, channel, exists, channels, inner, STAT, T)
                mean, rest, m2, t, e = centred_moments(
                    t, place[1], e, e_place[1], known, n, inner, T.edges, T
                )
                centre = mean
            else:
                KEPT: tl.constexpr = "evict_last" if APPLY else ""
                mean, rest, m2 = moments_of_split(x, begin, end, group, channels, inner, STAT, KEPT, T)
            if SPLIT:
                store_partial(partials, split, mean, rest, m2, channel, exists, channels)
                word = words + 1 + group
                found = arrive(word)
                if is_last(found, splits):
                    moments_ = merge_partials(
                        partials, splits, total, group, channel, exists, channels, inner, STAT, T
                    )
                    a_, b_ = finalise(
                        count,
                        moments_,
                        load_running(running, channel, exists, STAT),
                        running,
                        affine,
                        saved,
                        channel,
                        exists,
                        channels,
                        settings,
                        AVERAGE_STD,
                    )
                    tl.store(published + channel, a_, mask=exists)
                    tl.store(published + channels + channel, b_, mask=exists)
                    release(word, found)
                    count_batch(running, words, groups)
                elif APPLY:
                    wait(word, found)
            else:
                a, b = finalise(
                    count,
                    (mean, rest, m2),
                    old,
                    running,
                    affine,
                    saved,
                    channel,
                    exists,
                    channels,
                    settings,
                    AVERAGE_STD,
                )

        if APPLY:
            if SPLIT:
                tl.debug_barrier()
                mean = tl.load(saved + channel, mask=exists, other=0.0)
                a = tl.load(published + channel, mask=exists, other=0.0)
                b = tl.load(published + channels + channel, mask=exists, other=0.0)
                if KEEP:  # the tile is centred on the mean of its split
                    b += (centre - mean) * a
            mean, a, b = spread(mean, inner, T), spread(a, inner, T), spread(b, inner, T)
            if KEEP:
                store(y, place, t * a + b)
                if T.edges:
                    store(y, e_place, e * a + b)
            else:
                normalise_split(x, y, begin, end, group, channels, inner, mean, a, b, STAT, T)
            if not SPLIT:
                count_batch(running, words, groups)


@triton.jit
def moments_of_split(
    x, begin, end, group, channels, inner, STAT: tl.constexpr, KEPT: tl.constexpr, T: tl.constexpr
):
    """The moments of the rows or vectors [begin, end) of a group, tile after tile, and of their edges."""
    place = locate(begin, end, group, channels, inner, T)
    t = load(x, place, STAT, KEPT)
    seen = rows_or_vectors(begin, end, place, T)
    n = seen.to(STAT)
    # Moments about the first tile's mean: about 0, those of a channel at 1e4 would be rounded away.
    pivot = channel_sum(t, inner, T) / tl.maximum(channel_sum(n + tl.zeros_like(t), inner, T), 1.0)
    channel, exists = channel_range(group, channels, T)
    known = anchor(x, begin, channel, exists, channels, inner, STAT, T)
    pivot = settled(pivot, known)
    mean_p = tl.where(seen, t - spread(pivot, inner, T), 0.0)
    m2_p = tl.zeros_like(t)
    for start in tl.range(begin + T.block, end, T.block, num_stages=T.stages):
        place = locate(start, end, group, channels, inner, T)
        t = load(x, place, STAT, KEPT) - spread(pivot, inner, T)
        n, mean_p, m2_p = welford(t, rows_or_vectors(start, end, place, T), n, mean_p, m2_p)
    n, rest, m2 = moments_of_places(n, mean_p, m2_p, inner, T)
    mean, rest = two_sum(pivot, rest)
    if T.edges:
        first, last = edge_segments(begin, end, inner, T)
        for segment in range(first, last, T.segments):
            e_place = edges(segment, begin, end, group, channels, inner, T)
            e = load(x, e_place, STAT, KEPT)
            n_e = channel_sum(e_place[1].to(STAT), inner, T)
            mean_e, rest_e, m2_e = moments(e, e_place[1], known, tl.maximum(n_e, 1.0), inner, T)
            n, mean, rest, m2 = merge(n, mean, rest, m2, n_e, mean_e, rest_e, m2_e)
    return mean, rest, m2


@triton.jit
def normalise_split(
    x, y, begin, end, group, channels, inner, mean, a, b, STAT: tl.constexpr, T: tl.constexpr
):
    """y = (x - mean) * a + b for the rows or vectors [begin, end) of a group, the last tile first."""
    if T.edges:
        first, last = edge_segments(begin, end, inner, T)
        for segment in range(first, last, T.segments):
            e_place = edges(segment, begin, end, group, channels, inner, T)
            e = load(x, e_place, STAT, "evict_first")
            store(y, e_place, (e - mean) * a + b)
    for start in tl.range(begin, end, T.block, num_stages=T.stages):
        place = locate(mirrored(start, begin, end, T), end, group, channels, inner, T)
        t = load(x, place, STAT, "evict_first")
        store(y, place, (t - mean) * a + b)
