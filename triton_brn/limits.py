"""What must hold of a plan, and the one place that makes plans: no thread spills, programs that wait for each
other all run at the same time, and offsets fit their integers. What is preferred within that: planner.py.

A threshold here was found by compiling, with the compiler's registers and spills in its comment, and the
compile report (bench/compile_report.py; tests/test_compile_report.py) fails where it does not hold.
"""

from __future__ import annotations

import math

from .plans import SHARED_RESERVED, STRATEGIES, Choice, Device, Plan
from .views import Tile, View, addressing, groups, length, power_of_two, vectors, whole_splits

#: Elements of x that a thread keeps without spilling. Compiled for sm_80 to sm_100 with 4 warps: forward, 64
#: take 181 to 255 registers; backward, which keeps x and dy, 178 to 255. Half-precision maps, forward, fit
#: 128 (236 to 255) with int32 offsets if they are aligned or, in clusters, of whole vectors and so large that
#: their edges are few. Where each element has a mask of its own, and where folded rows wait, 64 spill.
#: float64 takes two registers an element.
KEEPS, KEEPS_FORWARD_HALF, KEEPS_MASKED = 64, 128, 32
#: Size of a map, in sectors of 32 bytes, from which a thread of a cluster keeps 128 elements of it without
#: spilling: maps of 39 sectors (25x25 in bfloat16) spill, those of 68 (33x33) take 247 registers.
LARGE_MAP = 72
#: Registers of a thread that keeps a tile: the most that the hardware has. Two programs of 4 such warps share
#: a multiprocessor: one computes while one waits.
KEPT_REGISTERS = 255
#: Warps of a program that keeps a tile, at most: with 16, a thread has 128 registers.
MOST_WARPS = 8
#: Bytes of x, and of dy, that a thread of a looped tile holds, at most, in LOOPED_REGISTERS (four programs
#: share a multiprocessor) without spilling; folded rows, float64 and ragged rows need LOOPED_REGISTERS_MORE.
LOOPED_BYTES = {"aligned": 32, "rows": 32, "folded": 16, "window": 32}
LOOPED_BYTES_BACKWARD = {"aligned": 32, "rows": 32, "folded": 32, "window": 16}
LOOPED_REGISTERS, LOOPED_REGISTERS_MORE = 128, 168
#: Warps and stages of a loop, and programs of a cluster, at most: more were never compiled.
MOST_WARPS_LOOPED, MOST_STAGES, MOST_CLUSTER = 16, 4, 16
#: Bytes of a row of a looped tile, at most: wider ones were never compiled.
LOOPED_ROW = 128
#: Bytes of a kept row: a sector, or half of one, which two multiprocessors then read.
SECTOR, HALF_SECTOR = 32, 16
#: Programs along a channel, at most: a grid's second axis, and the arrivals that a word of the workspace
#: counts (kernels/barrier.py).
MOST_SPLITS = 65_535
#: Segments whose edges make a tile of a loop.
EDGES = 16


def lacks(strategy: str, device: Device) -> str:
    """Why a device has none of this strategy, whatever the sizes; empty where it has it."""
    if strategy == "cluster" and not device.clusters:
        return "clusters need CUDA's compute capability 9.0 to 11.x and Triton 3.8"
    if strategy in ("cooperative", "blocked") and not device.waits:
        return "programs cannot wait for each other"
    if strategy == "blocked" and not device.l2:
        return "the size of L2 is not known"
    return ""


def unlawful(choice: Choice, direction: str) -> str:
    """Why no sizes, and no device, can have such a plan for ``direction``; empty where some may."""
    if choice.strategy not in STRATEGIES:
        return f"there is no strategy {choice.strategy!r}"
    if direction == "inference" and choice.strategy != "two_launch":
        return "inference has no statistics to wait for"
    numbers = (choice.block, choice.width, choice.warps, choice.ctas, choice.stages)
    if any(n < 1 or n & (n - 1) for n in numbers) or choice.slots < 1 or choice.splits < 1:
        return "its numbers are no powers of two, or less than 1"
    if choice.ctas > 1 and choice.strategy != "cluster":
        return "only a cluster has several programs a tile"
    if choice.stages > (MOST_STAGES if choice.strategy in ("blocked", "two_launch") else 1):
        return f"loops have {MOST_STAGES} stages at most, and kept tiles no loop"
    return ""


class Problem:
    """What is to be planned, and the limits that its plans keep.

    Args:
        direction: "forward", "backward" or "inference".
        view: the tensor's sizes, none of them 0.
        itemsize: bytes per element of x.
        device: where it runs.
    """

    def __init__(self, direction: str, view: View, itemsize: int, device: Device) -> None:
        self.direction, self.view, self.itemsize, self.device = direction, view, itemsize, device
        self.tile = addressing(view, itemsize)
        self.total = length(view, self.tile)

    def build(self, choice: Choice) -> Plan | str:
        """The plan that ``choice`` makes of this problem, or why there is none.

        The numbers may come from a file: whatever they are, the plan keeps the limits.
        """
        if why := unlawful(choice, self.direction) or lacks(choice.strategy, self.device):
            return why
        if choice.strategy in ("resident", "cluster"):
            return self._whole(choice)
        return self._cooperative(choice) if choice.strategy == "cooperative" else self._looped(choice)

    def _whole(self, choice: Choice) -> Plan | str:
        """A channel group kept by one program, or by one cluster."""
        cluster, programs = choice.strategy == "cluster", choice.ctas
        if cluster and self.tile.rows:
            return "a cluster splits a channel, and Triton would split the columns of rows"
        row_bytes = max(HALF_SECTOR, min(SECTOR, choice.width * self.itemsize))
        tile = self.kept(power_of_two(self.total), row_bytes)
        limit = programs * choice.warps * self.keeps(waits=False, cluster=cluster)
        if tile.elements > limit:
            what, holds = "a channel group", "a program's registers hold"
            if cluster:
                what, holds = "a channel", f"the registers of {programs} programs hold"
            return f"{what} takes {tile.elements:,} elements, {holds} {limit:,}"
        if cluster and tile.elements < programs * choice.warps * self.device.warp * tile.vec:
            return f"a channel of {tile.elements:,} elements is too small to share"
        if cluster and not 2 <= programs <= MOST_CLUSTER:
            return f"a cluster has 2 to {MOST_CLUSTER} programs"
        if choice.warps > MOST_WARPS or not self.fills(tile, choice.warps):
            return f"{choice.warps} warps are more than {MOST_WARPS}, or than the tile fills"
        n = groups(self.view, tile)
        return Plan(choice.strategy, tile, n, n, 1, choice.warps, KEPT_REGISTERS, programs)

    def _cooperative(self, choice: Choice) -> Plan | str:
        """A channel group kept by several programs that wait for each other."""
        if choice.warps > MOST_WARPS:
            return f"{choice.warps} warps are more than {MOST_WARPS}"
        at_once = self.device.co_resident(choice.warps, KEPT_REGISTERS)
        block = min(choice.block, power_of_two(self.total))
        limit = choice.warps * self.keeps(waits=True)
        if self.kept(1).width * block > limit:
            return f"a tile has {self.kept(1).width * block:,} elements, a program's registers hold {limit:,}"
        splits = min(max(choice.splits, -(-self.total // block)), self.total)
        if splits > min(at_once, MOST_SPLITS):
            return f"a channel group takes {splits:,} programs, {at_once} run at the same time"
        tile = self.kept(min(block, power_of_two(-(-self.total // splits))))
        if not self.fills(tile, choice.warps):
            return f"{choice.warps} warps are more than the tile fills"
        splits = whole_splits(self.total, splits, tile.grain)
        n = groups(self.view, tile)
        slots = min(choice.slots, n, at_once // splits)
        return Plan("cooperative", tile, n, slots, splits, choice.warps, KEPT_REGISTERS)

    def _looped(self, choice: Choice) -> Plan | str:
        """A channel group walked through tile by tile, twice."""
        tile = self.wide_rows(choice.width * self.itemsize)
        if tile.rows and not tile.folded and tile.width * self.itemsize > LOOPED_ROW:
            return f"rows of more than {LOOPED_ROW} bytes were never compiled"
        tile = self.looped(tile, choice.block, choice.stages)
        if choice.warps > MOST_WARPS_LOOPED or not self.fills(tile, choice.warps):
            return f"{choice.warps} warps are more than {MOST_WARPS_LOOPED}, or than the tile fills"
        limit = choice.warps * self.device.warp * self.per_thread()
        if tile.elements > limit:
            return f"a tile has {tile.elements:,} elements, a program's registers hold {limit:,}"
        registers = self.looped_registers if choice.stages == 1 else LOOPED_REGISTERS_MORE
        shared = (self.tensors - 1) * choice.stages * tile.elements * self.itemsize * (choice.stages > 1)
        if self.device.shared and shared + SHARED_RESERVED > self.device.shared:
            return f"the stages take {shared:,} bytes of shared memory, a program has {self.device.shared:,}"
        n = groups(self.view, tile)
        slots, most = n, MOST_SPLITS
        if choice.strategy == "blocked":
            at_once = self.device.co_resident(choice.warps, registers, shared)
            read_again = self.group_bytes(tile) * (self.tensors - 1)
            if read_again > self.device.l2:
                return f"a channel group takes {read_again:,} bytes, L2 holds {self.device.l2:,}"
            if not at_once:
                return "no program of these registers and stages fits on a multiprocessor"
            slots = min(choice.slots, self.most_blocked(tile), at_once)
            most = min(most, at_once // slots)
        splits = whole_splits(self.total, min(choice.splits, most), tile.block)
        return Plan(choice.strategy, tile, n, slots, splits, choice.warps, registers)

    @property
    def tensors(self) -> int:
        """Tensors of x's size that a call reads or writes."""
        return 3 if self.direction == "backward" else 2

    def group_bytes(self, tile: Tile) -> int:
        """Bytes of x that a channel group has."""
        return self.view.outer * self.view.inner * tile.channels * self.itemsize

    def most_blocked(self, tile: Tile) -> int:
        """Most channel groups at a time of which L2 holds all that passes between two reads of a tile."""
        return min(groups(self.view, tile), max(1, self.device.l2 // (self.group_bytes(tile) * self.tensors)))

    @property
    def looped_registers(self) -> int:
        """Registers of a thread that loops."""
        more = self.tile.folded or self.itemsize == 8 or (self.tile.rows and self.ragged)
        return LOOPED_REGISTERS_MORE if more else LOOPED_REGISTERS

    def keeps(self, *, waits: bool, cluster: bool = False) -> int:
        """Elements that a warp keeps, at most."""
        most = KEEPS
        if self.ragged or (waits and self.tile.folded):
            most = KEEPS_MASKED
        elif self.direction == "forward" and self.itemsize == 2 and not waits:
            few_edges = self.tile.edges and self.view.inner >= LARGE_MAP * self.tile.lead
            window = cluster and few_edges and self.tile.vec == 8
            if (self.tile.shape == "aligned" or window) and not self.wide(self.tile):
                most = KEEPS_FORWARD_HALF
        if self.itemsize == 8:
            most //= 4 if waits else 2
        return self.device.warp * most

    def per_thread(self) -> int:
        """Elements of a looped tile that a thread holds, at most."""
        table = LOOPED_BYTES_BACKWARD if self.direction == "backward" else LOOPED_BYTES
        return table[self.tile.shape] // (2 if self.ragged else 1) // self.itemsize

    @property
    def ragged(self) -> bool:
        """Whether accesses are so narrow that each element, or two, has an address and a mask of its own."""
        return not self.tile.folded and self.tile.vec * self.itemsize < (16 if self.tile.rows else 8)

    def fills(self, tile: Tile, warps: int) -> bool:
        """Whether no thread would only repeat what another does. One warp is always allowed."""
        return warps == 1 or tile.elements >= warps * self.device.warp

    def kept(self, block: int, row_bytes: int = SECTOR) -> Tile:
        """The tile of ``block`` rows or vectors, kept. Splits begin at multiples of 32 bytes."""
        tile = self.wide_rows(row_bytes)
        segments = 0
        if tile.edges:  # of so many vectors, and of those that begin or end between them
            segments = power_of_two(min(self.view.outer, (block - 1) // vectors(self.view, tile) + 2))
        grain = 1 if tile.rows else min(tile.lead // tile.vec, block)
        return self.finished(tile._replace(block=block, segments=segments, grain=grain))

    def looped(self, tile: Tile, block: int, stages: int = 1) -> Tile:
        """The tile of a loop, of ``block`` rows or vectors at most."""
        block = min(block, power_of_two(self.total))
        segments = EDGES if tile.edges else 0
        return self.finished(tile._replace(block=block, segments=segments, grain=block, stages=stages))

    def wide_rows(self, row_bytes: int) -> Tile:
        """The addressing, with rows of plain channels so wide."""
        if not self.tile.rows or self.tile.folded:
            return self.tile
        width = max(self.tile.vec, min(row_bytes // self.itemsize, power_of_two(self.view.channels)))
        return self.tile._replace(width=width, channels=width)

    def finished(self, tile: Tile) -> Tile:
        piece = min(256, max(16, tile.elements // 16 // tile.channels))
        return tile._replace(wide=self.wide(tile), piece=piece)

    def wide(self, tile: Tile) -> bool:
        """Whether 32 bits do not hold the offsets of a tile. It may pass the end by less than 2**20."""
        reach = math.prod(self.view)
        if not tile.rows:  # a window gives a segment more vectors than it has
            reach = max(reach, (self.view.outer + tile.segments) * vectors(self.view, tile))
        return reach >= 2**31 - 2**20
