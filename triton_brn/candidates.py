"""Other ways than the planner's to run a call, within the same limits: what tuning chooses from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from .planner import (
    EDGES,
    HALF_SECTOR,
    KEPT_REGISTERS,
    LOOPED_REGISTERS_MORE,
    MOST_WARPS,
    SECTOR,
    _Call,
    lacks,
)
from .plans import SHARED_RESERVED, STRATEGIES, Device, Plan
from .views import Tile, View, groups, power_of_two, whole_splits

#: Programs along a grid's second axis at most, and arrivals that a word of the workspace counts.
MOST_SPLITS = 65_535
MOST_CLUSTER, MOST_WARPS_LOOPED, MOST_STAGES = 16, 16, 4


@dataclass(frozen=True)
class Choice:
    """A plan in a few numbers, which other sizes of the same magnitude can be planned from."""

    strategy: str
    block: int  # rows, or vectors, per tile; a tile that holds a whole channel follows the sizes
    width: int  # elements of a row per tile; cooperative rows are a sector wide
    warps: int
    ctas: int  # programs of a cluster
    slots: int  # channel groups served at a time, at most
    splits: int  # programs along a channel
    stages: int  # tiles of a loop on their way at a time: from 2 on they wait in shared memory


#: Steps from one choice to its neighbours: what is doubled, and what is halved.
STEPS = (
    (("warps",), ()),
    (("block",), ()),
    (("width",), ()),
    (("ctas",), ()),
    (("slots",), ()),
    (("splits",), ()),
    (("stages",), ()),
    (("block", "warps"), ()),
    (("width",), ("block",)),
    (("ctas",), ("warps",)),
    (("slots",), ("splits",)),
)


def choice_of(plan: Plan) -> Choice:
    """The numbers of a plan."""
    tile = plan.tile
    numbers = (tile.block, tile.width, plan.num_warps, plan.num_ctas, plan.slots, plan.splits, tile.stages)
    return Choice(plan.strategy, *numbers)


def strategies(direction: str, view: View, itemsize: int, device: Device) -> list[Plan]:
    """The planner's plan for every strategy that can serve the call."""
    call = _Call(direction, view, itemsize, device)
    names = ("two_launch",) if direction == "inference" else STRATEGIES
    plans = (getattr(call, name)(True) for name in names if not lacks(name, device))
    return [plan for plan in plans if isinstance(plan, Plan)]


def neighbours(plan: Plan, direction: str, view: View, itemsize: int, device: Device) -> list[Plan]:
    """The plans one step away: one number, or two together, doubled or halved."""
    found: dict[Plan, None] = {}  # a set that keeps its order
    for choice in _steps(choice_of(plan)):
        neighbour = planned(choice, direction, view, itemsize, device)
        if neighbour is not None and neighbour != plan:
            found[neighbour] = None
    return list(found)


def _steps(choice: Choice) -> Iterator[Choice]:
    for twice, half in STEPS:
        for doubled, halved in ((twice, half), (half, twice)):
            changed = {name: getattr(choice, name) * 2 for name in doubled}
            changed |= {name: max(1, getattr(choice, name) // 2) for name in halved}
            yield dataclasses.replace(choice, **changed)


def planned(choice: Choice, direction: str, view: View, itemsize: int, device: Device) -> Plan | None:
    """The plan that ``choice`` makes for these sizes; None where it cannot serve them.

    The numbers may come from a file: whatever they are, the plan keeps the planner's limits, by which
    programs that wait all run at the same time, and kernels do not spill but for a few registers.
    """
    if direction == "inference" and choice.strategy != "two_launch":
        return None
    numbers = (choice.block, choice.width, choice.warps, choice.ctas, choice.stages)
    if any(n < 1 or n & (n - 1) for n in numbers) or choice.slots < 1 or choice.splits < 1:
        return None
    if lacks(choice.strategy, device) or (choice.ctas > 1 and choice.strategy != "cluster"):
        return None
    loops = choice.strategy in ("blocked", "two_launch")
    if choice.stages > (MOST_STAGES if loops else 1):
        return None
    call = _Call(direction, view, itemsize, device)
    if choice.strategy in ("resident", "cluster"):
        return _whole(choice, call)
    if choice.strategy == "cooperative":
        return _cooperative(choice, call)
    return _looped(choice, call) if loops else None


def _whole(choice: Choice, call: _Call) -> Plan | None:
    """A channel group kept by one program, or by one cluster."""
    row_bytes = max(HALF_SECTOR, min(SECTOR, choice.width * call.itemsize))
    tile = call.kept(power_of_two(call.total), row_bytes)
    programs = choice.ctas
    cluster = choice.strategy == "cluster"
    if cluster:
        if tile.rows or not 2 <= programs <= MOST_CLUSTER:
            return None
        if tile.elements < programs * choice.warps * call.device.warp * tile.vec:
            return None
    if choice.warps > MOST_WARPS or not _fills(tile, choice.warps, call):
        return None
    if tile.elements > programs * choice.warps * call.keeps(waits=False, cluster=cluster):
        return None
    n = groups(call.view, tile)
    return Plan(choice.strategy, tile, n, n, 1, choice.warps, KEPT_REGISTERS, programs)


def _cooperative(choice: Choice, call: _Call) -> Plan | None:
    """A channel group kept by several programs that wait for each other."""
    at_once = call.device.co_resident(choice.warps, KEPT_REGISTERS) if choice.warps <= MOST_WARPS else 0
    block = min(choice.block, power_of_two(call.total))
    if call.kept(1).width * block > choice.warps * call.keeps(waits=True):
        return None
    splits = min(max(choice.splits, -(-call.total // block)), call.total)
    if splits > min(at_once, MOST_SPLITS):
        return None
    tile = call.kept(min(block, power_of_two(-(-call.total // splits))))
    if not _fills(tile, choice.warps, call):
        return None
    splits = whole_splits(call.total, splits, tile.grain)
    n = groups(call.view, tile)
    slots = min(choice.slots, n, at_once // splits)
    return Plan("cooperative", tile, n, slots, splits, choice.warps, KEPT_REGISTERS)


def _looped(choice: Choice, call: _Call) -> Plan | None:
    """A channel group walked through tile by tile, twice."""
    tile = call.wide_rows(choice.width * call.itemsize)
    block = min(choice.block, power_of_two(call.total))
    segments = EDGES if tile.edges else 0
    tile = call.finished(tile._replace(block=block, segments=segments, grain=block, stages=choice.stages))
    registers = call.looped_registers if choice.stages == 1 else LOOPED_REGISTERS_MORE
    if choice.warps > MOST_WARPS_LOOPED or not _fills(tile, choice.warps, call):
        return None
    if tile.elements > choice.warps * call.device.warp * call.per_thread():
        return None
    if tile.rows and not tile.folded and tile.width * call.itemsize > 128:  # more was never compiled
        return None
    n = groups(call.view, tile)
    slots, most = n, MOST_SPLITS
    tensors = 3 if call.direction == "backward" else 2
    shared = choice.stages * tile.elements * call.itemsize * (tensors - 1) if choice.stages > 1 else 0
    if call.device.shared and shared + SHARED_RESERVED > call.device.shared:
        return None
    if choice.strategy == "blocked":
        each = call.view.outer * call.view.inner * tile.channels * call.itemsize
        at_once = call.device.co_resident(choice.warps, registers, shared)
        if each * (tensors - 1) > call.device.l2 or not at_once:
            return None
        slots = min(choice.slots, n, max(1, call.device.l2 // (each * tensors)), at_once)
        most = min(most, at_once // slots)
    splits = whole_splits(call.total, min(choice.splits, most), tile.block)
    return Plan(choice.strategy, tile, n, slots, splits, choice.warps, registers)


def _fills(tile: Tile, warps: int, call: _Call) -> bool:
    """Whether no thread would only repeat what another does. One warp is always allowed."""
    return warps == 1 or tile.elements >= warps * call.device.warp
