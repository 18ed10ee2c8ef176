"""The planner is a pure function: every plan covers its tensor, within the limits of the device."""

from __future__ import annotations

import itertools
import math

import pytest

from triton_brn import planner
from triton_brn.planner import Device, View, plan, view_of

H100 = Device("cuda:90", sms=132)
VIEWS = [
    View(*v) for v in itertools.product((1, 2, 7, 32, 512, 100_000), (1, 3, 64, 2048), (1, 4, 49, 196, 3136))
]


@pytest.mark.parametrize("direction", ["forward", "backward", "inference"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_plans_cover_the_tensor(direction: str, itemsize: int) -> None:
    for view in VIEWS:
        how = plan(direction, view, itemsize, H100)
        total = view.outer if how.rows else view.outer * planner.segment_vectors(view, how.window, how.vec)
        blocks = -(-total // how.block)
        per_split = -(-blocks // how.splits)
        assert (how.splits - 1) * per_split < blocks <= how.splits * per_split, "a split is empty"
        assert how.groups * (how.width if how.rows else 1) >= view.channels
        assert how.strategy == "two_launch" or blocks == how.splits == 1
        assert how.splits <= 65_535, "the limit of CUDA's second grid axis"
        assert how.wide == (math.prod(view) >= 2**31 - 2**20)
        for power in (how.vec, how.block, how.width, how.num_warps):
            assert power & (power - 1) == 0, f"{power} is not a power of two"
        assert how.width % how.vec == 0
        assert how.block * how.width <= 2**15
        assert how.num_warps <= 16


def test_accesses_are_16_bytes_where_alignment_allows() -> None:
    for inner, itemsize, expected in (
        (3136, 2, (False, False, 8)),
        (3136, 4, (False, False, 4)),
        (196, 2, (False, False, 4)),  # 14x14: 8 bytes, no window needed
        (49, 2, (False, True, 8)),
        (49, 4, (False, True, 4)),
        (1, 2, (True, False, 8)),
        (1, 8, (True, False, 2)),
    ):
        assert planner.addressing(View(4, 64, inner), itemsize) == expected
    assert planner.addressing(View(1, 3, 49), 2) == (False, False, 1), "the window would pass the end"
    assert planner.addressing(View(4, 3, 49), 2) == (False, True, 4)


def test_rows_tiles_hold_whole_sectors() -> None:
    for channels, itemsize in itertools.product((64, 96, 2048), (2, 4, 8)):
        how = plan("forward", View(512, channels, 1), itemsize, H100)
        assert how.width * itemsize >= 32


@pytest.mark.parametrize(
    ("shape", "stride", "view"),
    [
        ((2, 3, 5, 7), (105, 35, 7, 1), (2, 3, 35)),
        ((2, 3, 5, 7), (105, 1, 21, 3), (70, 3, 1)),  # channels_last
        ((2, 3, 5, 7), (105, 35, 1, 5), (2, 3, 35)),  # width before height
        ((2, 3, 5), (15, 1, 3), (10, 3, 1)),  # (N, L, C) transposed
        ((4, 3), (1, 4), (1, 3, 4)),  # (C, N) transposed
        ((4, 3), (3, 1), (4, 3, 1)),
        ((4, 3, 1, 1), (3, 1, 1, 1), (4, 3, 1)),
        ((4, 3, 1, 1), (3, 1, 99, 7), (4, 3, 1)),  # the strides of axes of size 1 mean nothing
        ((2, 1, 5, 7), (35, 35, 7, 1), (1, 1, 70)),
        ((6, 1), (1, 1), (1, 1, 6)),
        ((1, 1, 1, 1), (9, 9, 9, 9), (1, 1, 1)),
        ((2, 3, 5, 7), (210, 70, 14, 2), None),  # every second column
        ((2, 3, 5, 7), (0, 35, 7, 1), None),  # expanded
    ],
)
def test_views(shape: tuple[int, ...], stride: tuple[int, ...], view: tuple[int, int, int] | None) -> None:
    found = view_of(shape, stride)
    assert found == view


def test_forced_strategy_holds_inside_the_block_only() -> None:
    small = View(2, 3, 49)
    with planner.forced_strategy("two_launch"):
        assert plan("forward", small, 4, H100).strategy == "two_launch"
        with planner.forced_strategy("resident"):
            assert plan("backward", small, 4, H100).strategy == "resident"
        assert plan("backward", small, 4, H100).strategy == "two_launch"
    assert plan("forward", small, 4, H100).strategy == "resident"
