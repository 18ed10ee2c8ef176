"""How the kernels see a tensor: its view, and the tiles of which kernels/tile.py says where they lie."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

#: Sectors of a map at least, for its edges to be a tile, or for it to share its first and last sector with
#: its neighbours: of smaller maps the tile is too large to keep, or what is shared too much of the whole.
EDGES_FROM = 8
#: Bytes of a folded row at most. Eight maps of 17x17 would be 2,312 elements in a row of 4,096, and take ten
#: times the instructions of a window.
FOLDED = 2_048


class View(NamedTuple):
    """A dense tensor as (outer, channels, inner): channel c is ``outer`` segments of ``inner`` elements."""

    outer: int
    channels: int
    inner: int


class Tile(NamedTuple):
    """What the kernels know of a plan when they are compiled, see kernels/tile.py."""

    rows: bool  # tiles of [rows, channels]; else a tile holds vectors of one channel
    folded: bool  # rows of whole maps
    window: bool  # segments do not start at multiples of lead
    edges: bool  # segments are no whole number of vectors
    vec: int  # elements per access
    lead: int  # elements of 32 bytes, what the memory's sectors hold
    channels: int  # of a group
    block: int = 0  # rows, or vectors, per tile
    width: int = 0  # elements of a row, or of a vector, per tile
    segments: int = 0  # whose edges make a tile
    grain: int = 1  # splits are multiples of it
    piece: int = 1  # partials of a group that are merged at a time
    stages: int = 1  # tiles of a loop on their way at a time
    wide: bool = False  # int64 offsets

    @property
    def shape(self) -> str:
        """The shape's name."""
        if self.rows:
            return "folded" if self.folded else "rows"
        return "window" if self.window else "aligned"

    @property
    def elements(self) -> int:
        """Of a tile, whether they exist or not."""
        return self.block * self.width


def addressing(view: View, itemsize: int) -> Tile:
    """How a view's elements are reached: 16-byte accesses wherever the tensor's size allows them."""
    most, lead = 16 // itemsize, 32 // itemsize
    if view.inner == 1:
        return Tile(True, False, False, False, math.gcd(view.channels, most), lead, 0)
    aligned = math.gcd(view.inner, most)
    maps = most // aligned  # that begin at a multiple of 16 bytes
    if maps == 1 and view.inner % lead and view.inner < EDGES_FROM * lead:
        maps = 2  # 7x8 in bfloat16 is three and a half sectors: a window would move 1.23 times the least
    while maps * view.inner * itemsize < 32:
        maps *= 2
    folds = maps > 1 and maps <= view.channels and maps * view.inner * itemsize <= FOLDED
    if folds and view.channels * view.inner % most == 0:
        return Tile(True, True, False, False, most, lead, maps, width=power_of_two(maps * view.inner))
    windowed = math.gcd(math.prod(view), most)  # the last window must not pass the tensor's end
    if aligned * itemsize >= 8 or aligned == windowed or view.inner < EDGES_FROM * lead:
        return Tile(False, False, view.inner % lead > 0, False, aligned, lead, 1, width=aligned)
    return Tile(False, False, True, True, windowed, lead, 1, width=windowed)


def length(view: View, tile: Tile) -> int:
    """Rows, or vectors, of a channel, as in kernels/tile.py."""
    if tile.rows:
        return view.outer
    return view.outer * vectors(view, tile)


def vectors(view: View, tile: Tile) -> int:
    """Vectors that a segment is given, as in kernels/tile.py."""
    if tile.edges:
        return view.inner // tile.lead * (tile.lead // tile.vec)
    if tile.window:
        return (view.inner + 2 * tile.lead - 2) // tile.lead * (tile.lead // tile.vec)
    return view.inner // tile.vec


def groups(view: View, tile: Tile) -> int:
    """Channel groups."""
    return -(-view.channels // tile.channels)


def whole_splits(total: int, splits: int, grain: int) -> int:
    """At most ``splits``, so many that none is empty when each is a multiple of ``grain``."""
    per_split = -(total // -splits)
    per_split = -(per_split // -grain) * grain
    return -(-total // per_split)


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> View | None:
    """A dense tensor's view, whatever the order of its axes in memory; None if it is not dense.

    What lies outside the channel axis in memory is ``outer``, what lies inside it ``inner``: the
    statistics do not depend on the order of the axes within either.
    """
    axes = sorted((axis for axis in range(len(shape)) if shape[axis] != 1), key=lambda axis: stride[axis])
    elements = inner = 1
    for axis in axes:
        if stride[axis] != elements:
            return None
        if axis == 1:
            inner = elements
        elements *= shape[axis]
    if shape[1] == 1:  # all of it is one contiguous segment
        inner = elements
    return View(elements // (shape[1] * inner), shape[1], inner)
