"""Where a tile lies in memory. Every input is (outer, channels, inner), dense.

``T``, a constexpr, is the tile of a launch plan (triton_brn.views.Tile): [T.block, T.width] elements
of T.channels channels, in one of two shapes:

- rows: T.block rows of T.width elements, one row an index of ``outer``. The T.channels neighbouring
  channels of a group lie side by side there: single elements of them where ``inner == 1``
  (channels_last or (N, C)), else whole small maps, ``T.folded``: eight 7x7 maps in bfloat16 are 784
  contiguous bytes that begin at a multiple of 16, where one alone begins anywhere.
- channel-major: T.block vectors of T.vec contiguous elements of one channel. The channel is ``outer``
  segments of ``inner`` elements, and its vectors are numbered through all segments, so a tile is full
  whatever the map's size. Where maps do not begin at multiples of 32 bytes (T.window), the vectors of a
  segment begin at such a multiple, T.lead elements, all the same: a 35x35 map in bfloat16 is 152 vectors
  of 16 bytes, not 1,225 scalars, and no request of 32 threads touches a sector more than it must. If a
  map is a whole number of vectors, they begin at or before the map. Otherwise (T.edges) they fill the
  sectors that are the map's alone, and what is left at both ends, less than a sector each, is a tile of
  its own: [T.segments, 2 T.lead].

Per-channel values are vectors of T.channels elements.
"""

import triton
import triton.language as tl


@triton.jit
def quotient(n, d):
    """n // d of numbers that are not negative: a GPU divides unsigned ones in fewer instructions."""
    UNSIGNED: tl.constexpr = tl.uint64 if n.dtype == tl.int64 else tl.uint32
    return (n.to(UNSIGNED) // tl.cast(d, UNSIGNED)).to(n.dtype)


@triton.jit
def length(outer, inner, T: tl.constexpr):
    """How many rows, or vectors, a channel has."""
    if T.rows:
        return outer
    else:
        return outer * vectors(inner, T)


@triton.jit
def vectors(inner, T: tl.constexpr):
    """Vectors that a segment is given, whether all of them exist or not."""
    if T.edges:
        return inner // T.lead * (T.lead // T.vec)
    elif T.window:  # of all sectors that it touches if it begins with the last element of one
        return (inner + 2 * T.lead - 2) // T.lead * (T.lead // T.vec)
    else:
        return inner // T.vec


@triton.jit
def known_multiple(channels, T: tl.constexpr):
    """``channels``, so that Triton knows it for a multiple of T.vec where rows say so."""
    if T.rows and not T.folded:
        channels = channels // T.vec * T.vec
    return channels


@triton.jit
def channel_range(group, channels, T: tl.constexpr):
    """The channels of a group, and which of them exist."""
    channel = group * T.channels + tl.arange(0, T.channels)
    return channel, channel < channels


@triton.jit
def split_range(split, splits, total, T: tl.constexpr):
    """The rows or vectors [begin, end) of a split: a multiple of T.grain, but for the last."""
    per_split = tl.cdiv(tl.cdiv(total, splits), T.grain) * T.grain
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, total)


@triton.jit
def mirrored(start, begin, end, T: tl.constexpr):
    """The tile that takes the place of the one at ``start`` when [begin, end) is walked backwards."""
    return begin + (end - begin - 1) // T.block * T.block - (start - begin)


@triton.jit
def locate(start, stop, group, channels, inner, T: tl.constexpr):
    """The place of the tile that begins at row or vector ``start``: offsets, and a mask that broadcasts
    over them, what is the group's.

    Sizes are divided and multiplied by T.vec so that Triton knows them for multiples of it.
    """
    i = (start + tl.arange(0, T.block))[:, None]
    lane = tl.arange(0, T.width)[None, :]
    if T.rows:
        row = channels
        column = group * T.width + lane
        inside = i < stop
        if T.folded:
            row = channels * inner // T.vec * T.vec
            maps = T.channels * inner // T.vec * T.vec
            inside &= lane < maps
            column = group * maps + lane
        inside &= column < row
        return i * row + column, inside
    else:
        per_segment = vectors(inner, T)
        segment = quotient(i, per_segment)
        vector = i - segment * per_segment
        if T.window:
            base = (segment * channels + group) * inner
            first = first_element(base, vector, T)
            if T.edges:
                inside = (i < stop) & (first < own_end(base, inner, T))
            else:
                inside = (i < stop) & (first + T.vec > base) & (first < base + inner)
            return first + lane, inside
        else:
            offsets = ((segment * channels + group) * per_segment + vector) * T.vec + lane
            return offsets, i < stop


@triton.jit
def anchor(x, begin, channel, exists, channels, inner, STAT: tl.constexpr, T: tl.constexpr):
    """What ``settled`` knows of each channel: a value, where the row, or the segment of the vector, ``begin``
    begins; and x. In half precision it needs none, and 0 is what it gets."""
    value = tl.zeros([1], STAT)
    if x.dtype.element_ty == STAT:
        if T.rows:
            offsets = begin * channels + channel
            if T.folded:
                offsets *= inner
        else:
            offsets = (begin // vectors(inner, T) * channels + channel) * inner
        value = tl.load(x + offsets, mask=exists, other=0.0)
    return value, x


@triton.jit
def rows_or_vectors(start, stop, place, T: tl.constexpr):
    """Which rows or vectors of the tile at ``place`` are the group's, [T.block, 1]."""
    if T.rows:
        return (start + tl.arange(0, T.block))[:, None] < stop
    else:
        return place[1]


@triton.jit
def first_sector(base, T: tl.constexpr):
    """The first sector of the segment that begins at element ``base``."""
    if T.edges:
        return quotient(base + T.lead - 1, T.lead)
    else:
        return quotient(base, T.lead)


@triton.jit
def first_element(base, vector, T: tl.constexpr):
    """The first element of a vector of the segment that begins at element ``base``, in a window."""
    return first_sector(base, T) * T.lead + vector * T.vec


@triton.jit
def own_end(base, inner, T: tl.constexpr):
    """The end of the sectors that are the segment's alone. Its right edge begins there."""
    return quotient(base + inner, T.lead) * T.lead


@triton.jit
def edge_segments(begin, end, inner, T: tl.constexpr):
    """The segments [first, last) that may have edges among the vectors [begin, end)."""
    per_segment = vectors(inner, T)
    return begin // per_segment, (end - 1) // per_segment + 1


@triton.jit
def edges(first, begin, end, group, channels, inner, T: tl.constexpr):
    """The place of the tile of both edges of T.segments segments from ``first`` on: offsets, and a mask;
    then the mask of whole vectors to load, and the offsets to store to. A left edge is with its segment's
    first vector, a right edge with the last.
    """
    segment = (first + tl.arange(0, T.segments))[:, None]
    lane = tl.arange(0, 2 * T.lead)[None, :]
    left = lane < T.lead
    base = (segment * channels + group) * inner
    per_segment = vectors(inner, T)
    i = segment * per_segment + tl.where(left, 0, per_segment - 1)
    mine = (i >= begin) & (i < end)
    # A product, so that Triton knows it for a multiple and loads whole vectors.
    start = tl.where(left, first_sector(base, T) - 1, quotient(base + inner, T.lead)) * T.lead
    offsets = start + lane % T.lead
    vector = start + lane // T.vec % (T.lead // T.vec) * T.vec
    touched = mine & (vector + T.vec > base) & (vector < base + inner)
    inside = mine & (offsets >= base) & (offsets < base + inner)
    # The same offsets, but Triton does not see that elements are neighbours. It would give a thread eight
    # of them, and each of eight requests of 32 threads would touch every sector of the tile.
    return offsets, inside, touched, start + (lane & (T.lead - 1))


@triton.jit
def counted(begin, end, group, channels, inner, T: tl.constexpr):
    """How many elements each channel has among the rows or vectors [begin, end), edges included."""
    if T.window:
        return position(end, group, channels, inner, T) - position(begin, group, channels, inner, T)
    elif T.folded:
        return (end - begin) * inner
    elif T.rows:
        return end - begin
    else:
        return (end - begin) * T.vec


@triton.jit
def position(i, group, channels, inner, T: tl.constexpr):
    """How many elements of the channel come before vector ``i``, in a window."""
    per_segment = vectors(inner, T)
    segment = quotient(i, per_segment)
    vector = i - segment * per_segment
    base = (segment * channels + group) * inner
    first = first_element(base, vector, T)
    if T.edges:
        first = tl.minimum(first, own_end(base, inner, T))
    before = tl.minimum(tl.maximum(first - base, 0), inner)
    return segment * inner + tl.where(vector == 0, 0, before)


@triton.jit
def load(pointer, place, STAT: tl.constexpr, KEPT: tl.constexpr):
    """A tile in the dtype of the statistics, zero where masked. place: (offsets, mask) from ``locate``, or
    what ``edges`` returns. KEPT: an eviction policy of L2."""
    if len(place) == 2:
        t = tl.load(pointer + place[0], mask=place[1], other=0.0, eviction_policy=KEPT)
    else:
        t = tl.load(pointer + place[0], mask=place[2], other=0.0, eviction_policy=KEPT)
        t = tl.where(place[1], t, 0.0)
    return t.to(STAT)


@triton.jit
def store(pointer, place, value):
    """Store a tile in the tensor's dtype."""
    value = value.to(pointer.dtype.element_ty)
    if len(place) == 2:
        tl.store(pointer + place[0], value, mask=place[1])
    else:
        tl.store(pointer + place[3], value, mask=place[1])


@triton.jit
def channel_sum(t, inner, T: tl.constexpr):
    """Sum a tile over each of its channels. One reduction over both axes: 16 shuffles, not 114."""
    if T.rows:
        s = tl.sum(t, 0)
        if T.folded:
            s = tl.sum(tl.where(owner(inner, T), s[None, :], 0.0), 1)
        return s
    else:
        return tl.sum(t) + tl.zeros([1], t.dtype)


@triton.jit
def spread(v, inner, T: tl.constexpr):
    """A per-channel vector, so that it broadcasts over a tile."""
    if T.folded:
        v = tl.sum(tl.where(owner(inner, T), v[:, None], 0.0), 0)
    return v


@triton.jit
def owner(inner, T: tl.constexpr):
    """Which channel of the group owns which element of a row: [T.channels, T.width]."""
    return tl.arange(0, T.channels)[:, None] == (tl.arange(0, T.width) // inner)[None, :]
