"""Other ways than the planner's to run a call, within the same limits: what tuning chooses from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .limits import Problem
from .planner import Proposals
from .plans import STRATEGIES, Choice, Device, Plan
from .views import View

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


def strategies(direction: str, view: View, itemsize: int, device: Device) -> list[Plan]:
    """The planner's plan for every strategy that can serve the call."""
    proposals = Proposals(Problem(direction, view, itemsize, device))
    names = ("two_launch",) if direction == "inference" else STRATEGIES
    plans = (proposals.plan(name, forced=True) for name in names)
    return [plan for plan in plans if isinstance(plan, Plan)]


def neighbours(plan: Plan, direction: str, view: View, itemsize: int, device: Device) -> list[Plan]:
    """The plans one step away: one number, or two together, doubled or halved."""
    found: dict[Plan, None] = {}  # a set that keeps its order
    for choice in _steps(plan.choice):
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
    """The plan that ``choice`` makes for these sizes; None where it cannot serve them."""
    plan = Problem(direction, view, itemsize, device).build(choice)
    return plan if isinstance(plan, Plan) else None
