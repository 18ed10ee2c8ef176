"""What tuning chooses from keeps the planner's limits. No device is touched."""

from __future__ import annotations

import itertools
import random

import pytest

from triton_brn import candidates, plans, views
from triton_brn.plans import Device
from triton_brn.views import View

DEVICES = (
    Device("cuda:90", 132, 90, (3, 9), l2=50 << 20),
    Device("cuda:80", 108, 80, (3, 9), l2=40 << 20),
    Device("hip", 304, 0, (3, 9), registers=131_072, warp=64),
    Device("interpreter", 2, waits=False),
)
VIEWS = [View(*v) for v in itertools.product((1, 7, 32, 5_000), (1, 17, 96, 2048), (1, 49, 289, 1225, 3136))]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_candidates_keep_the_planners_limits(device: Device) -> None:
    numbers = random.Random(0)
    for view, itemsize, direction in itertools.product(
        VIEWS, (2, 4, 8), ("forward", "backward", "inference")
    ):
        for plan in candidates.strategies(direction, view, itemsize, device):
            choice = plan.choice
            again = candidates.planned(choice, direction, view, itemsize, device)
            if not plan.waits or runs_at_once(plan, device):
                assert again == plan, "the numbers of a plan make the plan"
            if numbers.random() < 0.1:  # all of them take a minute
                for near in candidates.neighbours(plan, direction, view, itemsize, device):
                    check_plan(near, view, device)
            # What was tuned for one size serves another, or nothing.
            other = numbers.choice(VIEWS)
            moved = candidates.planned(choice, direction, other, itemsize, device)
            if moved is not None:
                check_plan(moved, other, device)


def test_tiles_on_their_way_fit_in_shared_memory() -> None:
    """A table may ask for more of them than a device holds."""
    choice = plans.Choice("two_launch", 1024, 8, 16, 1, 64, 8, stages=4)
    view = View(64, 64, 3136)
    for shared, fits in ((101_376, False), (232_448, True)):
        device = Device("cuda", 128, 89, (3, 9), shared=shared)
        assert (candidates.planned(choice, "backward", view, 2, device) is not None) == fits


def runs_at_once(plan: plans.Plan, device: Device) -> bool:
    return plan.slots * plan.splits <= device.co_resident(plan.num_warps, plan.registers)


def check_plan(plan: plans.Plan, view: View, device: Device) -> None:
    total = views.length(view, plan.tile)
    per_split = -(-total // plan.splits)
    per_split = -(-per_split // plan.tile.grain) * plan.tile.grain
    assert (plan.splits - 1) * per_split < total <= plan.splits * per_split, "a split is empty"
    assert not plan.kept or per_split <= plan.tile.block, "a split is one tile"
    assert plan.groups * plan.tile.channels >= view.channels
    assert 1 <= plan.slots <= plan.groups
    assert plan.splits <= 65_535
    assert not plan.waits or runs_at_once(plan, device)
    for power in (plan.tile.block, plan.tile.width, plan.num_warps, plan.num_ctas, plan.tile.stages):
        assert power & (power - 1) == 0
    assert plan.tile.stages <= (1 if plan.kept else 4)
