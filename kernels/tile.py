"""Where a tile lies in memory. Every input is (outer, channels, inner), dense.

A tile is [BLOCK, WIDTH] elements, in one of two shapes:

- rows (``inner == 1``: channels_last or (N, C)): BLOCK rows of WIDTH neighbouring channels;
- channel-major: BLOCK vectors of WIDTH contiguous elements of one channel. The channel is ``outer``
  segments of ``inner`` elements, and its vectors are numbered through all segments, so a tile is
  full whatever the map's size. In a map that is no multiple of WIDTH the vectors of a segment start
  at the multiple of WIDTH at or before the segment (an aligned WINDOW): a 7x7 map in bfloat16 is 7
  vectors of 16 bytes, not 49 scalars.

Per-channel values are vectors of CHANNELS elements: WIDTH in the rows shape, else 1.
"""

import triton
import triton.language as tl


@triton.jit
def length(outer, inner, ROWS: tl.constexpr, WINDOW: tl.constexpr, VEC: tl.constexpr):
    """How many rows, or vectors, a channel has."""
    if ROWS:
        return outer
    else:
        return outer * vectors(inner, WINDOW, VEC)


@triton.jit
def vectors(inner, WINDOW: tl.constexpr, VEC: tl.constexpr):
    """Vectors that a segment touches, at most: it may start on the last element of one."""
    if WINDOW:
        return (inner + 2 * VEC - 2) // VEC
    else:
        return inner // VEC


@triton.jit
def channel_range(group, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a program's group, and which of them exist."""
    CHANNELS: tl.constexpr = WIDTH if ROWS else 1
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def locate(
    start,
    stop,
    group,
    channels,
    inner,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Offsets of the tile that begins at row or vector ``start``, and three masks: elements inside
    the channel, what to load, and what to store as whole vectors. Only in a WINDOW do they differ.

    Sizes are divided and multiplied by VEC so that Triton knows them for multiples of it.
    """
    i = (start + tl.arange(0, BLOCK))[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    if ROWS:
        channel = group * WIDTH + lane
        offsets = i * (channels // VEC * VEC) + channel
        inside = (i < stop) & (channel < channels // VEC * VEC)
        return offsets, inside, inside, inside
    else:
        per_segment = vectors(inner, WINDOW, VEC)
        segment = i // per_segment
        vector = i - segment * per_segment
        if WINDOW:
            base = (segment * channels + group) * inner
            first = (base // VEC + vector) * VEC
            offsets = first + lane
            inside = (i < stop) & (offsets >= base) & (offsets < base + inner)
            touched = (i < stop) & (first < base + inner)
            whole = (i < stop) & (first >= base) & (first + VEC <= base + inner)
            return offsets, inside, touched, whole
        else:
            offsets = ((segment * channels + group) * per_segment + vector) * VEC + lane
            inside = i < stop
            return offsets, inside, inside, inside


@triton.jit
def load(pointer, offsets, inside, touched, STAT: tl.constexpr, WINDOW: tl.constexpr):
    """The tile in the dtype of the statistics, zero outside the channel."""
    t = tl.load(pointer + offsets, mask=touched, other=0.0).to(STAT)
    if WINDOW:
        t = tl.where(inside, t, 0.0)
    return t


@triton.jit
def store(pointer, offsets, value, inside, whole, WINDOW: tl.constexpr):
    """Store what is inside the channel; the two edges of a window's segment element by element."""
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets, value, mask=whole)
    if WINDOW:
        tl.store(pointer + offsets, value, mask=inside & ~whole)


@triton.jit
def channel_sum(t, ROWS: tl.constexpr):
    """Sum a tile over each of its channels. One reduction over both axes: 16 shuffles, not 114."""
    if ROWS:
        return tl.sum(t, 0)
    else:
        return tl.sum(t) + tl.zeros([1], t.dtype)


@triton.jit
def split_range(split, total, BLOCK: tl.constexpr):
    """The rows or vectors [begin, end) of a split; program axis 1 counts the splits."""
    blocks = (total + BLOCK - 1) // BLOCK
    splits = tl.num_programs(1)
    per_split = (blocks + splits - 1) // splits * BLOCK
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, total)


@triton.jit
def mirrored(start, begin, end, BLOCK: tl.constexpr):
    """The tile that takes the place of the one at ``start`` when [begin, end) is walked backwards."""
    return begin + (end - begin - 1) // BLOCK * BLOCK - (start - begin)


@triton.jit
def tile_count(
    start,
    end,
    inside,
    STAT: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many elements of each channel lie inside the tile."""
    if WINDOW:
        return channel_sum(inside.to(STAT), ROWS)
    elif ROWS:
        return tl.minimum(end - start, BLOCK).to(STAT)
    else:
        return (tl.minimum(end - start, BLOCK) * VEC).to(STAT)


@triton.jit
def arrive(ticket, expected):
    """Whether this program is the last of ``expected`` to arrive. Everything that it and the others
    wrote before is then visible to it, and everything that they read has been read."""
    tl.debug_barrier()  # the release below is one thread's: first all warps must be here
    return tl.atomic_add(ticket, 1, sem="acq_rel") == expected - 1
