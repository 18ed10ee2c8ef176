"""How a call is run: a pure function from sizes and device to a launch plan. No device is touched.

Each strategy proposes a choice, and ``limits.Problem`` makes the plan of it. What is proposed follows the
preferences below.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from .limits import (
    HALF_SECTOR,
    KEPT_REGISTERS,
    LOOPED_ROW,
    MOST_SPLITS,
    MOST_WARPS,
    Problem,
    lacks,
)
from .plans import STRATEGIES, Choice, Device, Plan
from .views import Tile, View, groups, power_of_two, whole_splits

# Preferences. Their numbers come from a model of traffic and of the instructions that a multiprocessor
# issues (emulated sm_80, sm_90 and sm_100, 2026-11), which knows no latency: a cost in microseconds is to
# take their place.

#: Elements that a thread holds before a kept tile gets more warps: every warp reads its channels' numbers
#: again, which costs 512x16 rows in bfloat16 13 % of traffic with 8 warps, 7 % with 4.
PER_THREAD = 64
#: Warps of a program that waits, and of one that loops: two of them share a multiprocessor.
WARPS = 4
#: Minimum elements of a program, where larger ones would leave multiprocessors idle: what every warp reads of
#: its channels' numbers is then below 5 % of the traffic, of rows below 10 %. SHARED_BY_MANY: of four or more
#: programs of a channel, of which the one that finalises weighs less. SHARED_ROWS: of rows; half of it where
#: not even a third of the multiprocessors would have any.
SHARED, SHARED_BY_MANY, SHARED_ROWS = 8_192, 5_000, 5_400
#: Programs per multiprocessor of a launch in which none waits.
PROGRAMS_PER_SM = 4
#: Ratio of how busy multiprocessors are, from which a cluster's warps are spread over twice the programs.
EVENER = 1.1
#: Ratio of a multiprocessor's work, cooperative over cluster, below which the cooperative plan is taken.
FULLER = 0.7
#: Ratio of splits, up to which a channel gets more of them, whose tiles then are full.
MORE_SPLITS = 1.4
#: Ratio of a multiprocessor's work to the least, up to which more programs are preferred.
FILLING = 1.1
#: Minimum folded rows of a program, for each of their maps, where multiprocessors would not be idle: to
#: spread the numbers of its channels over a row costs a program as much.
ROWS_PER_MAP = 2
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
    proposals = Proposals(Problem(direction, view, itemsize, device))
    for name in [strategy] if strategy else STRATEGIES:
        found = proposals.plan(name, forced=bool(strategy))
        if isinstance(found, Plan):
            return found
    raise ValueError(f"strategy: {strategy!r} cannot run {direction} on {view} on {device.name}: {found}")


class Proposals:
    """What each strategy proposes for a problem: a choice, or why another strategy is preferred."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.device = problem, problem.device

    def plan(self, strategy: str, *, forced: bool) -> Plan | str:
        """The plan of this strategy, or why there is none. forced: whether it is asked for."""
        if why := lacks(strategy, self.device):
            return why
        choice = getattr(self, strategy)(forced)
        return self.problem.build(choice) if isinstance(choice, Choice) else choice

    def resident(self, forced: bool) -> Choice | str:
        problem = self.problem
        tile = problem.kept(power_of_two(problem.total))
        limit = MOST_WARPS * problem.keeps(waits=False)
        n = groups(problem.view, tile)
        half = problem.kept(tile.block, HALF_SECTOR)
        # Rows of half a sector: better read twice, once from L2, than half of the multiprocessors idle.
        if (
            tile.elements <= limit
            and 2 * n <= self.device.sms
            and half.elements >= self.device.warp * half.vec
        ):
            alone = self.quick_dram or 2 * n < self.device.sms // 3
            slow = alone and half != tile and tile.elements > SHARED
            if not forced and slow and self.has("cooperative"):
                return "cooperative programs fill as many multiprocessors, and read no sector twice"
            tile, n = half, groups(problem.view, half)
        large = tile.elements > limit // 2  # alone on a multiprocessor
        few = n < self.device.sms and tile.elements > SHARED
        if not forced and (large or few) and self.has("cluster"):
            return "a cluster's programs share multiprocessors, and fill more of them"
        return Choice("resident", tile.block, tile.width, min(MOST_WARPS, self.warps(tile, waits=False)))

    def cluster(self, forced: bool) -> Choice | str:
        problem = self.problem
        tile = problem.kept(power_of_two(problem.total))
        n = groups(problem.view, tile)
        keeps = problem.keeps(waits=False, cluster=True)
        for ctas, warps in ((2, 4), (4, 4), (8, 4), (8, 8), (16, 8)):
            idle = n * ctas < self.device.sms and tile.elements >= 2 * ctas * SHARED
            if tile.elements <= ctas * warps * keeps and not (idle and ctas < 8):
                break
        if ctas < 8 and self.balance(2 * n * ctas) > EVENER * self.balance(n * ctas):
            ctas, warps = 2 * ctas, warps // 2
        choice = Choice("cluster", tile.block, tile.width, warps, ctas)
        if not forced and self.emptier(choice):
            return "cooperative programs run at the same time, and hold fewer empty places"
        return choice

    def cooperative(self, forced: bool) -> Choice | str:
        problem, total, sms = self.problem, self.problem.total, self.device.sms
        at_once = self.device.co_resident(WARPS, KEPT_REGISTERS)
        width = problem.kept(1).width
        block = min(power_of_two(total), WARPS * problem.keeps(waits=True) // width)
        splits = -(-total // block)
        if splits > at_once:  # refused, and why
            return Choice("cooperative", block, width, WARPS, splits=splits)
        full = problem.kept(block)
        n = groups(problem.view, full)
        elements = total * width
        few = SHARED if elements < 4 * SHARED else SHARED_BY_MANY
        most = max(splits + splits // 8, elements // (SHARED_ROWS if full.rows else few))
        if full.rows and n * most < sms // 3:
            most = max(most, 2 * elements // SHARED_ROWS)
        ways = [
            (slots, whole_splits(total, min(programs // slots, most), full.grain))
            for programs in (sms, at_once)
            for slots in range(1, min(n, programs // splits) + 1)
        ]
        # The least work for a multiprocessor in all turns; up to a tenth more, if that fills the device.
        work = {(g, s): -(n // -g) * -(total // -s) * -(g * s // -sms) for g, s in ways}
        near = [way for way in ways if work[way] <= FILLING * min(work.values())]
        slots, splits = max(near, key=lambda way: (way[0] * way[1], -work[way]))
        if self.quick_dram and full.shape == "rows":  # a full tile of half the size, not one half empty
            half = problem.kept(max(1, power_of_two(-(total // -splits)) // 2))
            more = -(total // -half.block)
            room = self.device.co_resident(min(WARPS, self.warps(half, waits=True)), KEPT_REGISTERS) // slots
            splits = more if splits < more <= min(MORE_SPLITS * splits, room) else splits
        tile = problem.kept(min(block, power_of_two(-(total // -splits))))
        warps = min(WARPS, self.warps(tile, waits=True))
        return Choice("cooperative", tile.block, tile.width, warps, slots=slots, splits=splits)

    def blocked(self, forced: bool) -> Choice | str:
        problem = self.problem
        at_once = self.device.co_resident(WARPS, problem.looped_registers)
        for row_bytes in (LOOPED_ROW, 64, 32):
            tile = self.looped(row_bytes)
            # What passes through L2 between two reads of a tile, at most.
            if problem.group_bytes(tile) * problem.tensors <= self.device.l2:
                break
        n = groups(problem.view, tile)
        slots = min(problem.most_blocked(tile), at_once)
        slots = -(-n // -(-n // slots))
        return self.of_loop("blocked", tile, slots, at_once // slots)

    def two_launch(self, forced: bool) -> Choice | str:
        tile, total = self.looped(LOOPED_ROW), self.problem.total
        n = groups(self.problem.view, tile)
        splits = min(max(1, -(-PROGRAMS_PER_SM * self.device.sms // n)), MOST_SPLITS)
        if tile.folded:
            splits = min(splits, max(1, total // (ROWS_PER_MAP * tile.channels), self.device.sms // n))
        return self.of_loop("two_launch", tile, n, splits)

    def looped(self, row_bytes: int) -> Tile:
        """The tile of a loop. Rows of plain channels are so wide."""
        tile = self.problem.wide_rows(row_bytes)
        most = WARPS * self.device.warp * self.problem.per_thread()
        return self.problem.looped(tile, max(most // tile.width, 1))

    def of_loop(self, strategy: str, tile: Tile, slots: int, splits: int) -> Choice:
        warps = self.warps_for(tile, self.problem.per_thread())
        return Choice(strategy, tile.block, tile.width, warps, slots=slots, splits=splits)

    def emptier(self, choice: Choice) -> bool:
        """Whether a cluster's tiles hold so much less of a channel than they could that cooperative ones are
        better: where instructions take longer than DRAM, and clusters wait for others to end. At each turn of
        a cooperative grid its programs meet."""
        cluster = self.problem.build(choice)
        if isinstance(cluster, str) or self.problem.direction != "forward" or not self.quick_dram:
            return False
        at_once = self.device.co_resident(cluster.num_warps, cluster.registers)
        if cluster.groups * cluster.num_ctas <= at_once:
            return False
        other = self.plan("cooperative", forced=False)
        if not isinstance(other, Plan) or other.groups > 2 * other.slots:
            return False
        return self.work(other) < FULLER * self.work(cluster)

    def has(self, strategy: str) -> bool:
        """Whether there is a plan of this strategy."""
        return isinstance(self.plan(strategy, forced=True), Plan)

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

    def warps(self, tile: Tile, waits: bool) -> int:
        """Warps of a kept tile."""
        keeps = self.problem.keeps(waits=waits) // self.device.warp
        return self.warps_for(tile, min(PER_THREAD, keeps))

    def warps_for(self, tile: Tile, per_thread: int) -> int:
        """Warps for a tile of which a thread has so many elements."""
        return min(16, max(1, tile.elements // (self.device.warp * per_thread)))
