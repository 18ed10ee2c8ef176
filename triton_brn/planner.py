"""How a call is run: a pure function from sizes and device to a launch plan. No device is touched."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

STRATEGIES = ("resident", "two_launch")


class View(NamedTuple):
    """A dense tensor as (outer, channels, inner): channel c is ``outer`` segments of ``inner`` elements."""

    outer: int
    channels: int
    inner: int


@dataclass(frozen=True)
class Device:
    """What the planner knows of a device."""

    name: str
    sms: int  # multiprocessors


@dataclass(frozen=True)
class Plan:
    """One way to run one direction on one view. The kernels' docstrings say what the fields mean."""

    strategy: str
    rows: bool  # tiles of [rows, channels]; else a tile holds vectors of one channel
    window: bool  # segments do not start at multiples of vec
    vec: int  # elements per access
    block: int  # rows, or vectors, per tile
    width: int  # channels, or elements of a vector, per tile
    wide: bool  # int64 offsets
    groups: int  # programs along the channels
    splits: int  # programs along a channel
    num_warps: int

    @property
    def tile(self) -> dict[str, int]:
        """The kernels' constexprs."""
        return {
            "ROWS": self.rows,
            "WINDOW": self.window,
            "VEC": self.vec,
            "BLOCK": self.block,
            "WIDTH": self.width,
            "WIDE": self.wide,
        }


#: Elements of a resident tile at most. Compiled for sm_90 with 16 warps: forward, 64 elements a thread
#: take 110 registers where half-precision maps are aligned; rows, windows and float32 spill. Backward
#: keeps x and dy: 32 elements a thread take 120 registers. float64 takes two registers an element.
RESIDENT = 16_384
RESIDENT_FORWARD_HALF_ALIGNED = 32_768
#: Elements a thread of a resident tile holds before the tile gets more warps.
PER_THREAD = {"forward": 32, "backward": 16}
#: Elements of a tile in a loop, and bytes of a thread's part: two 16-byte loads in flight, and two
#: programs to an SM. With twice that, a window's masks spill scalar registers on AMD, and the
#: backward's sums spill on sm_80.
LOOPED, LOOPED_BYTES = 4_096, 32
#: Programs per multiprocessor that a split launch aims at.
PROGRAMS_PER_SM = 4

_forced: str | None = None


@contextmanager
def forced_strategy(strategy: str) -> Iterator[None]:
    """Run training with this strategy inside the ``with`` block, for tests and tuning.

    Holds for all threads of the process (autograd runs the backward in its own). A call that the
    strategy cannot serve raises ValueError and says why.

    Args:
        strategy: ``"resident"`` or ``"two_launch"``.
    """
    global _forced
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def plan(direction: str, view: View, itemsize: int, device: Device) -> Plan:
    """The plan for ``direction`` ("forward", "backward", "inference"), under ``forced_strategy``.

    Args:
        direction: what runs; "inference" is the forward with running statistics.
        view: the tensor's sizes, none of them 0.
        itemsize: bytes per element of x.
        device: where it runs.

    Raises:
        ValueError: the forced strategy cannot serve this view, and why.
    """
    return _plan(direction, view, itemsize, device, _forced if direction != "inference" else "two_launch")


@functools.lru_cache(maxsize=4096)
def _plan(direction: str, view: View, itemsize: int, device: Device, forced: str | None) -> Plan:
    rows, window, vec = addressing(view, itemsize)
    wide = math.prod(view) >= 2**31 - 2**20  # a tile may reach past the end, by less than 2**20
    total = view.outer if rows else view.outer * segment_vectors(view, window, vec)
    width = max(vec, min(32 // itemsize, power_of_two(view.channels))) if rows else vec

    block = power_of_two(total)
    limit = RESIDENT // (2 if itemsize == 8 else 1)
    if direction == "forward" and itemsize == 2 and not rows and not window:
        limit = RESIDENT_FORWARD_HALF_ALIGNED
    if forced == "resident" and block * width > limit:
        raise ValueError(
            f"strategy: 'resident' keeps a channel in one program's registers, {limit:,} elements at most "
            f"{direction}; {view} takes {block * width:,}"
        )
    if forced != "two_launch" and direction != "inference" and block * width <= limit:
        warps = warps_for(block * width, PER_THREAD[direction])
        return Plan("resident", rows, window, vec, block, width, wide, groups(view, rows, width), 1, warps)

    if rows:  # wider rows: whole 128-byte lines
        width = max(vec, min(128 // itemsize, power_of_two(view.channels)))
    block = min(power_of_two(total), max(LOOPED // width, 1))
    n = groups(view, rows, width)
    tiles = -(-total // block)
    splits = min(tiles, max(1, -(-PROGRAMS_PER_SM * device.sms // n)), 65_535)
    splits = -(-tiles // -(-tiles // splits))  # no split is empty
    warps = warps_for(block * width, LOOPED_BYTES // itemsize)
    return Plan("two_launch", rows, window, vec, block, width, wide, n, splits, warps)


def addressing(view: View, itemsize: int) -> tuple[bool, bool, int]:
    """(rows, window, vec) of a view: 16-byte accesses wherever the tensor's size allows them."""
    most = 16 // itemsize
    if view.inner == 1:
        return True, False, math.gcd(view.channels, most)
    aligned = math.gcd(view.inner, most)
    windowed = math.gcd(math.prod(view), most)  # the last window must not pass the tensor's end
    if aligned * itemsize >= 8 or aligned == windowed:
        return False, False, aligned
    return False, True, windowed


def segment_vectors(view: View, window: bool, vec: int) -> int:
    """Vectors that a segment touches, as in kernels/tile.py."""
    return (view.inner + 2 * vec - 2) // vec if window else view.inner // vec


def groups(view: View, rows: bool, width: int) -> int:
    """Programs along the channels."""
    return -(-view.channels // width) if rows else view.channels


def warps_for(elements: int, per_thread: int) -> int:
    """Warps for a tile of that many elements."""
    return min(16, max(1, elements // (32 * per_thread)))


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
