"""The planner is a pure function: every plan covers its tensor, within the limits of the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from triton_brn import planner, views
from triton_brn.planner import plan
from triton_brn.plans import STRATEGIES, Device, Plan
from triton_brn.views import View, view_of

H100 = Device("cuda:90", sms=132, capability=90, triton=(3, 9), l2=50 << 20)
B200 = Device("cuda:100", sms=148, capability=100, triton=(3, 9), l2=126 << 20)
A100 = Device("cuda:80", sms=108, capability=80, triton=(3, 9), l2=40 << 20)
MI300 = Device("hip:gfx942", sms=304, triton=(3, 9), warp=64)
SMALL = Device("other", sms=20, waits=False)
VIEWS = [
    View(*v) for v in itertools.product((1, 2, 7, 32, 512, 100_000), (1, 3, 64, 2048), (1, 4, 49, 196, 3136))
]
DEVICES = (H100, A100, MI300, SMALL)


def plans(direction: str, view: View, itemsize: int, device: Device) -> Iterator[Plan]:
    """Every strategy's plan, and the one that is chosen."""
    yield plan(direction, view, itemsize, device)
    for strategy in STRATEGIES:
        with suppress(ValueError):
            yield plan(direction, view, itemsize, device, strategy)


@pytest.mark.parametrize("direction", ["forward", "backward", "inference"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_plans_cover_the_tensor(direction: str, itemsize: int, device: Device) -> None:
    for view in VIEWS:
        for how in plans(direction, view, itemsize, device):
            tile, total = how.tile, views.length(view, how.tile)
            per_split = math.ceil(math.ceil(total / how.splits) / tile.grain) * tile.grain
            assert (how.splits - 1) * per_split < total <= how.splits * per_split, "a split is empty"
            assert not how.kept or per_split <= tile.block, "what is kept is one tile"
            assert how.splits == 1 or how.split
            assert (how.groups - 1) * tile.channels < view.channels <= how.groups * tile.channels
            assert how.slots <= how.groups
            assert how.splits <= 65_535, "the limit of CUDA's second grid axis, and of kernels/barrier.py"
            assert tile.wide == (math.prod(view) >= 2**31 - 2**20)  # of windows, see below
            sizes = [tile.vec, tile.block, tile.width, tile.channels, tile.piece, how.num_warps, how.num_ctas]
            for size in sizes + [tile.segments] * tile.edges:
                assert size & (size - 1) == 0, f"{size} is not a power of two"
            assert tile.width % tile.vec == 0
            assert how.num_warps <= 16
            if how.waits:
                assert how.slots * how.splits <= device.co_resident(how.num_warps, how.registers)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("device", [H100, A100], ids=lambda device: device.name)
def test_large_tensors_fill_the_device(direction: str, itemsize: int, device: Device) -> None:
    """Two programs a multiprocessor, where each has 32k elements.

    A seventh less where whole rows or the traffic of small tiles allow no finer split: 192 of 216 for
    (512, 2048, 7, 7), 220 of 264 for (100_000, 64, 2, 2).
    """
    for view in VIEWS:
        how = plan(direction, view, itemsize, device)
        if math.prod(view) >= 2 * device.sms * 32_768:
            assert how.slots * how.splits * how.num_ctas >= 2 * device.sms * 5 / 6, (view, how)


def test_strategies() -> None:
    for view, itemsize, expected in (
        (View(512, 2048, 1), 2, ("resident", "resident")),
        (View(32, 64, 3136), 2, ("cluster", "cooperative")),
        (View(100_352, 64, 1), 2, ("cooperative", "cooperative")),
        (View(524_288, 32, 1), 2, ("blocked", "blocked")),
        (View(64, 32, 2_097_152), 2, ("two_launch", "two_launch")),
    ):
        for direction in ("forward", "backward"):
            found = tuple(plan(direction, view, itemsize, device).strategy for device in (H100, A100))
            assert found == expected, view
            assert plan(direction, view, itemsize, SMALL).strategy in ("resident", "two_launch")


@pytest.mark.parametrize(
    ("strategy", "view", "device", "why"),
    [
        ("resident", View(4, 2, 100_000), H100, "registers hold"),
        ("cluster", View(32, 64, 3136), A100, "compute capability 9.0"),
        ("cluster", View(32, 64, 3136), replace(H100, triton=(3, 7)), "Triton 3.8"),
        ("cluster", View(512, 64, 1), H100, "columns of rows"),
        ("cluster", View(2, 64, 64), H100, "too small to share"),
        ("cluster", View(64, 64, 100_352), H100, "16 programs hold"),
        ("cooperative", View(32, 64, 3136), SMALL, "cannot wait"),
        ("cooperative", View(8, 32, 2_097_152), H100, "run at the same time"),
        ("blocked", View(32, 64, 3136), SMALL, "cannot wait"),
        ("blocked", View(64, 32, 2_097_152), H100, "L2 holds"),
    ],
)
def test_strategies_say_why_not(strategy: str, view: View, device: Device, why: str) -> None:
    with pytest.raises(ValueError, match=f"strategy: '{strategy}' cannot run forward on .*{why}"):
        plan("forward", view, 2, device, strategy)


def test_accesses_are_16_bytes_where_alignment_allows() -> None:
    for view, itemsize, shape, vec in (
        (View(4, 64, 3136), 2, "aligned", 8),
        (View(4, 64, 3136), 4, "aligned", 4),
        (View(4, 64, 196), 2, "folded", 8),  # two 14x14 maps are 784 bytes
        (View(4, 64, 196), 4, "window", 4),
        (View(4, 64, 56), 2, "folded", 8),  # 7x8 is half a sector too long
        (View(4, 64, 64), 2, "aligned", 8),
        (View(4, 64, 1225), 2, "window", 8),
        (View(4, 64, 49), 4, "folded", 4),
        (View(4, 64, 1), 2, "rows", 8),
        (View(4, 64, 1), 8, "rows", 2),
        (View(1, 3, 49), 2, "window", 1),  # a vector would pass the end of the tensor
        (View(4, 3, 49), 2, "window", 1),  # too few channels to fold, too small for edges
        (View(4, 3, 169), 2, "window", 4),
    ):
        tile = views.addressing(view, itemsize)
        assert (tile.shape, tile.vec) == (shape, vec), view


@pytest.mark.parametrize(
    ("view", "wide"),
    [
        (View(70_000_000, 2, 3), True),  # 420 million elements, but 2,240 million vectors to number
        (View(1, 2, 1_000_000_001), True),  # the tile of edges passes the end by 15 segments
        (View(1_000_000, 64, 25), False),
    ],
)
def test_windows_number_more_vectors_than_there_are(view: View, wide: bool) -> None:
    assert plan("forward", view, 2, H100).tile.wide == wide


def test_rows_tiles_hold_whole_sectors() -> None:
    """Or half ones, where a whole channel is kept and whole ones would leave half of the device idle."""
    for channels, itemsize in itertools.product((64, 96, 2048), (2, 4, 8)):
        for how in plans("forward", View(512, channels, 1), itemsize, H100):
            few = how.strategy == "resident" and 2 * channels * itemsize // 32 <= H100.sms
            assert how.tile.width * itemsize == 16 if few else how.tile.width * itemsize >= 32
    for rows, width in ((16, 8), (32, 4)):  # 16 halves would be less than 16 bytes for each of 32 threads
        assert plan("forward", View(rows, 64, 1), 4, H100, "resident").tile.width == width


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


@pytest.mark.parametrize(
    ("direction", "view", "device", "expected"),
    [
        # Programs of two warps instead of four: 640 load 132 multiprocessors more evenly than 320.
        ("forward", View(32, 160, 289), H100, ("cluster", 4, 2, 160, 1)),
        # Every program spreads the numbers of its channels over a row.
        ("inference", View(4, 2048, 49), H100, ("two_launch", 1, 4, 256, 1)),
        # A cluster's tile would be half empty.
        ("forward", View(32, 96, 1225), B200, ("cooperative", 1, 4, 49, 6)),
        ("forward", View(1, 196, 17_424), B200, ("cooperative", 1, 4, 98, 3)),
        ("backward", View(32, 96, 1225), B200, ("cluster", 8, 4, 96, 1)),
        # Full tiles of half the size.
        ("forward", View(9248, 128, 1), B200, ("cooperative", 1, 2, 8, 37)),
        ("forward", View(9248, 128, 1), H100, ("cooperative", 1, 4, 8, 27)),
        # Few channels.
        ("backward", View(1156, 96, 1), H100, ("cooperative", 1, 2, 6, 6)),
    ],
)
def test_plans_that_tuning_has_corrected(direction: str, view: View, device: Device, expected: tuple) -> None:
    how = plan(direction, view, 2, device)
    assert (how.strategy, how.num_ctas, how.num_warps, how.slots, how.splits) == expected
