"""How a call is run: a pure function from sizes and device to a launch plan. No device is touched."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

from .plans import STRATEGIES, Device, Plan
from .views import Tile, View, addressing, groups, length, power_of_two, vectors, whole_splits

#: Elements of x that a thread keeps without spilling. Compiled for sm_80 to sm_100 with 4 warps: forward, 64
#: take 181 to 255 registers; backward, which keeps x and dy, 178 to 255. Half-precision maps, forward, fit
#: 128 (236 to 255) with int32 offsets if they are aligned or, in clusters, of whole vectors and so large that
#: their edges are few. Where each element has a mask of its own, and where folded rows wait, 64 spill.
#: float64 takes two registers an element.
KEEPS, KEEPS_FORWARD_HALF, KEEPS_MASKED = 64, 128, 32
#: Sectors of such a map at least. With 128 elements a thread, maps of 39 (25x25 in bfloat16) spill; those of
#: 68 (33x33) take 247 registers at most.
LARGE_MAP = 72
#: Elements a thread holds before a kept tile gets more warps: every warp reads its channels' numbers
#: again, which costs 512x16 rows in bfloat16 13 % of traffic with 8 warps, 7 % with 4.
PER_THREAD = 64
MOST_WARPS = 8
#: Warps of a program that waits, and of one that loops. With the 255 registers that a thread can have, two
#: of them share a multiprocessor: one computes while one waits.
WARPS = 4
KEPT_REGISTERS = 255
#: Bytes of x, and of dy, that a thread of a looped tile holds: so many that 128 registers are enough, and
#: four programs share a multiprocessor.
LOOPED_BYTES = {"aligned": 32, "rows": 32, "folded": 16, "window": 32}
LOOPED_BYTES_BACKWARD = {"aligned": 32, "rows": 32, "folded": 32, "window": 16}
LOOPED_REGISTERS, LOOPED_REGISTERS_MORE = 128, 168
#: Elements of a program at least, where larger ones would leave multiprocessors idle: what every warp
#: reads of its channels' numbers is then below 5 % of the traffic, of rows below 10 %. Where a channel is
#: shared by four or more programs, the one that finalises weighs less. Rows of which not even a third of the
#: multiprocessors would have any are shared by twice as many.
SHARED, SHARED_BY_MANY, SHARED_ROWS = 8_192, 5_000, 5_400
#: Bytes of a kept row. With half a sector, each is read by two multiprocessors, by one of them from L2, and
#: both have half of the work: better than to leave half of them idle.
SECTOR, HALF_SECTOR = 32, 16
#: Programs per multiprocessor that a launch aims at where none waits.
PROGRAMS_PER_SM = 4
#: A cluster's warps are spread over twice the programs, up to 8, if multiprocessors are so much busier then.
EVENER = 1.1
#: A cooperative plan takes a cluster's place if a multiprocessor has so much less work.
FULLER = 0.7
#: Splits of a channel for so many times as many, whose tiles then are full.
MORE_SPLITS = 1.4
#: Folded rows of a program at least, for each of their maps, where multiprocessors would not be idle: to
#: spread the numbers of its channels over a row costs a program as much.
ROWS_PER_MAP = 2
#: Segments whose edges make a tile of a loop.
EDGES = 16
_forced: str | None = None


@contextmanager
def forced_strategy(strategy: str) -> Iterator[None]:
    """Run training with this strategy inside the ``with`` block, for tests and tuning.

    Holds for all threads of the process (autograd runs the backward in its own). A call that the
    strategy cannot serve raises ValueError and says why.

    Args:
        strategy: one of ``"resident"``, ``"cluster"``, ``"cooperative"``, ``"blocked"``, ``"two_launch"``.
    """
    global _forced
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The strategy of the ``forced_strategy`` block that is open."""
    return _forced


def plan(direction: str, view: View, itemsize: int, device: Device, strategy: str | None = None) -> Plan:
    """The plan for ``direction`` ("forward", "backward", "inference").

    Args:
        direction: what runs; "inference" is the forward with running statistics, and its backward. Neither
            waits for statistics: the plan is that of two_launch, whatever strategy is asked for.
        view: the tensor's sizes, none of them 0.
        itemsize: bytes per element of x.
        device: where it runs.
        strategy: the one to plan; None: that of ``forced_strategy`` or, outside of one, the best.

    Raises:
        ValueError: the strategy cannot serve this view, and why.
    """
    if direction == "inference":  # there are no statistics to wait for
        strategy = "two_launch"
    return _plan(direction, view, itemsize, device, strategy or forced())


@functools.lru_cache(maxsize=4096)
def _plan(direction: str, view: View, itemsize: int, device: Device, strategy: str | None) -> Plan:
    call = _Call(direction, view, itemsize, device)
    for name in [strategy] if strategy else STRATEGIES:
        found = lacks(name, device) or getattr(call, name)(bool(strategy))
        if isinstance(found, Plan):
            return found
    raise ValueError(f"strategy: {strategy!r} cannot run {direction} on {view} on {device.name}: {found}")


def lacks(strategy: str, device: Device) -> str:
    """Why a device has none of this strategy, whatever the sizes; empty where it has it."""
    if strategy == "cluster" and not device.clusters:
        return "clusters need CUDA's compute capability 9.0 to 11.x and Triton 3.8"
    if strategy in ("cooperative", "blocked") and not device.waits:
        return "programs cannot wait for each other"
    if strategy == "blocked" and not device.l2:
        return "the size of L2 is not known"
    return ""


class _Call:
    """What is to be planned. Each strategy's method returns a plan, or why there is none."""

    def __init__(self, direction: str, view: View, itemsize: int, device: Device) -> None:
        self.direction, self.view, self.itemsize, self.device = direction, view, itemsize, device
        self.tile = addressing(view, itemsize)
        self.total = length(view, self.tile)

    def resident(self, forced: bool) -> Plan | str:
        tile = self.kept(power_of_two(self.total))
        limit = MOST_WARPS * self.keeps(waits=False)
        if tile.elements > limit:
            return f"a channel group takes {tile.elements:,} elements, a program's registers hold {limit:,}"
        n = groups(self.view, tile)
        half = self.kept(tile.block, HALF_SECTOR)
        if 2 * n <= self.device.sms and half.elements >= self.device.warp * half.vec:
            alone = self.quick_dram or 2 * n < self.device.sms // 3
            slow = alone and half != tile and tile.elements > SHARED
            if not forced and slow and self.has("cooperative"):
                return "cooperative programs fill as many multiprocessors, and read no sector twice"
            tile, n = half, groups(self.view, half)
        large = tile.elements > limit // 2  # alone on a multiprocessor
        few = n < self.device.sms and tile.elements > SHARED
        if not forced and (large or few) and self.has("cluster"):
            return "a cluster's programs share multiprocessors, and fill more of them"
        warps = min(MOST_WARPS, self.warps(tile, waits=False))
        return Plan("resident", tile, n, n, 1, warps, KEPT_REGISTERS)

    def cluster(self, forced: bool) -> Plan | str:
        if self.tile.rows:
            return "a cluster splits a channel, and Triton would split the columns of rows"
        tile = self.kept(power_of_two(self.total))
        n = groups(self.view, tile)
        keeps = self.keeps(waits=False, cluster=True)
        for ctas, warps in ((2, 4), (4, 4), (8, 4), (8, 8), (16, 8)):
            fits = tile.elements <= ctas * warps * keeps
            idle = n * ctas < self.device.sms and tile.elements >= 2 * ctas * SHARED
            if fits and not (idle and ctas < 8):
                if tile.elements < ctas * warps * 32 * tile.vec:
                    return f"a channel of {tile.elements:,} elements is too small to share"
                if ctas < 8 and self.balance(2 * n * ctas) > EVENER * self.balance(n * ctas):
                    ctas, warps = 2 * ctas, warps // 2
                plan = Plan("cluster", tile, n, n, 1, warps, KEPT_REGISTERS, ctas)
                if not forced and self.emptier(plan):
                    return "cooperative programs run at the same time, and hold fewer empty places"
                return plan
        limit = 16 * MOST_WARPS * keeps
        return f"a channel takes {tile.elements:,} elements, the registers of 16 programs hold {limit:,}"

    def cooperative(self, forced: bool) -> Plan | str:
        at_once = self.device.co_resident(WARPS, KEPT_REGISTERS)
        width = self.kept(1).width
        block = min(power_of_two(self.total), WARPS * self.keeps(waits=True) // width)
        splits = -(-self.total // block)
        if splits > at_once:
            return f"a channel group takes {splits:,} programs, {at_once} run at the same time"
        full = self.kept(block)
        n = groups(self.view, full)
        elements = self.total * width
        few = SHARED if elements < 4 * SHARED else SHARED_BY_MANY
        most = max(splits + splits // 8, elements // (SHARED_ROWS if self.tile.rows else few))
        sms = self.device.sms
        if self.tile.rows and n * most < sms // 3:
            most = max(most, 2 * elements // SHARED_ROWS)
        ways = [
            (slots, whole_splits(self.total, min(programs // slots, most), full.grain))
            for programs in (sms, at_once)
            for slots in range(1, min(n, programs // splits) + 1)
        ]
        # The least work for a multiprocessor in all turns; up to a tenth more, if that fills the device.
        work = {(g, s): -(n // -g) * -(self.total // -s) * -(g * s // -sms) for g, s in ways}
        near = [way for way in ways if work[way] <= 1.1 * min(work.values())]
        slots, splits = max(near, key=lambda way: (way[0] * way[1], -work[way]))
        if self.quick_dram and self.tile.shape == "rows":  # a full tile of half the size, not one half empty
            half = self.kept(max(1, power_of_two(-(self.total // -splits)) // 2))
            more = -(self.total // -half.block)
            room = self.device.co_resident(min(WARPS, self.warps(half, waits=True)), KEPT_REGISTERS) // slots
            splits = more if splits < more <= min(MORE_SPLITS * splits, room) else splits
        tile = self.kept(min(block, power_of_two(-(self.total // -splits))))
        warps = min(WARPS, self.warps(tile, waits=True))
        return Plan("cooperative", tile, n, slots, splits, warps, KEPT_REGISTERS)

    def blocked(self, forced: bool) -> Plan | str:
        at_once = self.device.co_resident(WARPS, self.looped_registers)
        tensors = 3 if self.direction == "backward" else 2
        for row_bytes in (128, 64, 32):
            tile = self.looped(row_bytes)
            each = self.view.outer * self.view.inner * tile.channels * self.itemsize
            # What passes through L2 between two reads of a tile, at most.
            if each * tensors <= self.device.l2:
                break
        if each * (tensors - 1) > self.device.l2:
            return f"a channel group takes {each * (tensors - 1):,} bytes, L2 holds {self.device.l2:,}"
        n = groups(self.view, tile)
        slots = min(n, max(1, self.device.l2 // (each * tensors)), at_once)
        slots = -(-n // -(-n // slots))
        splits = whole_splits(self.total, at_once // slots, tile.block)
        warps = self.warps_for(tile, self.per_thread())
        return Plan("blocked", tile, n, slots, splits, warps, self.looped_registers)

    def two_launch(self, forced: bool) -> Plan | str:
        tile = self.looped(128)
        n = groups(self.view, tile)
        splits = min(max(1, -(-PROGRAMS_PER_SM * self.device.sms // n)), 65_535)
        if tile.folded:
            splits = min(splits, max(1, self.total // (ROWS_PER_MAP * tile.channels), self.device.sms // n))
        splits = whole_splits(self.total, splits, tile.block)
        warps = self.warps_for(tile, self.per_thread())
        return Plan("two_launch", tile, n, n, splits, warps, self.looped_registers)

    @property
    def looped_registers(self) -> int:
        """Registers of a thread that loops."""
        more = self.tile.folded or self.itemsize == 8 or (self.tile.rows and self.ragged)
        return LOOPED_REGISTERS_MORE if more else LOOPED_REGISTERS

    def emptier(self, cluster: Plan) -> bool:
        """Whether a cluster's tiles hold so much less of a channel than they could that cooperative ones are
        better: where instructions take longer than DRAM, and clusters wait for others to end. At each turn of
        a cooperative grid its programs meet."""
        if self.direction != "forward" or not self.quick_dram:
            return False
        at_once = self.device.co_resident(cluster.num_warps, cluster.registers)
        if cluster.groups * cluster.num_ctas <= at_once:
            return False
        other = self.cooperative(False)
        if not isinstance(other, Plan) or other.groups > 2 * other.slots:
            return False
        return self.work(other) < FULLER * self.work(cluster)

    def has(self, strategy: str) -> bool:
        """Whether there is a plan of this strategy."""
        return not lacks(strategy, self.device) and isinstance(getattr(self, strategy)(True), Plan)

    @property
    def quick_dram(self) -> bool:
        """Whether DRAM (8 TB/s at compute capability 10.0) takes less time than instructions, and L2."""
        return 100 <= self.device.capability < 120

    def work(self, plan: Plan) -> int:
        """Elements that a multiprocessor holds in all turns of a kept plan, whether they exist or not."""
        programs = plan.slots * plan.splits * plan.num_ctas
        each = plan.tile.elements // plan.num_ctas
        return -(plan.groups // -plan.slots) * -(programs // -self.device.sms) * each

    def balance(self, programs: int) -> float:
        """What part of its time a multiprocessor is busy, if all programs take the same time."""
        return programs / (-(programs // -self.device.sms) * self.device.sms)

    def keeps(self, *, waits: bool, cluster: bool = False) -> int:
        """Elements that a warp keeps."""
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

    def warps(self, tile: Tile, waits: bool) -> int:
        """Warps of a kept tile."""
        return self.warps_for(tile, min(PER_THREAD, self.keeps(waits=waits) // self.device.warp))

    def warps_for(self, tile: Tile, per_thread: int) -> int:
        """Warps for a tile of which a thread has so many elements."""
        return min(16, max(1, tile.elements // (self.device.warp * per_thread)))

    def per_thread(self) -> int:
        """Elements of a looped tile that a thread holds."""
        table = LOOPED_BYTES_BACKWARD if self.direction == "backward" else LOOPED_BYTES
        return table[self.tile.shape] // (2 if self.ragged else 1) // self.itemsize

    @property
    def ragged(self) -> bool:
        """Whether accesses are so narrow that each element, or two, has an address and a mask of its own."""
        return not self.tile.folded and self.tile.vec * self.itemsize < (16 if self.tile.rows else 8)

    def kept(self, block: int, row_bytes: int = SECTOR) -> Tile:
        """The tile of ``block`` rows or vectors, kept. Splits begin at multiples of 32 bytes."""
        tile = self.wide_rows(row_bytes)
        segments = 0
        if tile.edges:  # of so many vectors, and of those that begin or end between them
            segments = power_of_two(min(self.view.outer, (block - 1) // vectors(self.view, tile) + 2))
        grain = 1 if tile.rows else min(tile.lead // tile.vec, block)
        return self.finished(tile._replace(block=block, segments=segments, grain=grain))

    def looped(self, row_bytes: int) -> Tile:
        """The tile of a loop. Rows of plain channels are so wide."""
        tile = self.wide_rows(row_bytes)
        block = min(
            power_of_two(self.total), max(WARPS * self.device.warp * self.per_thread() // tile.width, 1)
        )
        return self.finished(tile._replace(block=block, segments=EDGES if tile.edges else 0, grain=block))

    def wide_rows(self, row_bytes: int) -> Tile:
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
