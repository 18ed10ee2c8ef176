"""What the kernels move, launch and occupy, counted by an emulator of NVIDIA GPUs; results beside it.

The counts are exact for the PTX that Triton made; the DRAM bytes come from a model of a cold L2 cache.
Needs a pytest plugin with the fixture ``emulated_launches``: the launches of a test so far, each with
``.stats``. Without one, nothing here is tested.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import inputs
from test_kernels import check

from triton_brn import limits, planner, plans, views
from triton_brn.tuning import Size

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
from triton_brn import search  # noqa: E402

SHAPES = (
    (4, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (4, 32, 149, 149),
    (4, 192, 35, 35),
    (8, 192, 17, 17),
    (512, 256),
    (512, 2048),
    (2, 32, 64, 64, 64),
)
#: Bytes between multiprocessors and L2, over the tensors' own: what every warp reads of its channels'
#: numbers and, in windows, the sectors that a map shares with its neighbours come on top.
SECTORS = {"aligned": 1.05, "rows": 1.10, "folded": 1.10, "window": 1.15}
DRAM = 1.05
#: Where x and dy of a group fit in L2, but not dx beside them: (2, 32, 64, 64, 64) on sm_80.
DRAM_MORE = 1.15
#: Requests for maps of no whole number of sectors, over those for the next size that is one.
REQUESTS = 1.3
#: Elements of the inputs that plans are searched for: larger ones take minutes.
MOST_SEARCHED = 2**22
#: Whose plans the search has corrected: few rows, more channels than multiprocessors, few channels.
SEARCHED_TOO = ((4, 2048, 7, 7), (32, 160, 17, 17), (4, 96, 17, 17))


def cases(*shapes: tuple[int, ...]) -> list[Any]:
    """Each in both layouts and dtypes."""
    return [
        pytest.param(shape, layout, dtype, id=f"{'x'.join(map(str, shape))}-{layout}-{str(dtype)[6:]}")
        for shape in shapes
        for layout in ("contiguous", "channels_last")[: 2 if len(shape) > 3 else 1]
        for dtype in (torch.bfloat16, torch.float32)
    ]


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> list[Any]:
    """Kernel launches of this test so far."""
    try:
        return request.getfixturevalue("emulated_launches")
    except pytest.FixtureLookupError:
        pytest.skip("needs an emulator that counts what a kernel moves")


def plan_of(direction: str, x: torch.Tensor) -> plans.Plan:
    view = views.view_of(x.shape, x.stride())
    return planner.plan(direction, view, x.element_size(), launch.device_of(x))


def moved(stats: Any) -> int:
    """Bytes between multiprocessors and L2: whole sectors of every request."""
    return 32 * (stats.sectors_read + stats.sectors_written)


def overflows_l2(x: torch.Tensor, tensors: int) -> bool:
    """Whether L2 cannot hold all tensors of a group of 32 bytes of channels_last."""
    return x.numel() // x.shape[1] * 32 * tensors > launch.device_of(x).l2


@pytest.mark.parametrize(("shape", "layout", "dtype"), cases(*SHAPES))
def test_one_launch_moves_each_tensor_once(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device, launches: list[Any]
) -> None:
    case = inputs(shape, dtype, layout, device=device, r_max=1.5, d_max=0.5)
    check(case, r_max=1.5, d_max=0.5)
    assert len(launches) == 2, "one launch forward, one backward"
    for direction, stats in zip(("forward", "backward"), (one.stats for one in launches), strict=True):
        how = plan_of(direction, case.x)
        tensors = 2 if direction == "forward" else 3
        ideal = tensors * case.x.numel() * case.x.element_size()
        sectors, dram = moved(stats) / ideal, (stats.dram_bytes_read + stats.dram_bytes_written) / ideal
        print(
            f"{direction:9}{how.strategy:12}{how.tile.shape:8} L2 {sectors:.3f} DRAM {dram:.3f} {stats.grid}"
        )
        assert stats.spills == 0
        assert stats.inactive_shfl_reads == 0
        again = 0 if how.kept else (tensors - 1) / tensors  # in L2 the second pass finds what the first read
        if how.tile.shape == "rows" and how.tile.width * case.x.element_size() == limits.HALF_SECTOR:
            again = 1  # every sector is touched by two programs
        assert sectors <= SECTORS[how.tile.shape] + again
        assert dram <= (DRAM_MORE if how.strategy == "blocked" and overflows_l2(case.x, tensors) else DRAM)
        sms = launch.device_of(case.x).sms
        if case.x.numel() >= 2 * sms * 32_768:
            assert stats.ctas >= 2 * sms, "two programs a multiprocessor"


@pytest.mark.parametrize(
    ("shape", "aligned"),
    [((4, 32, 149, 149), 22_208), ((4, 192, 35, 35), 1_232), ((8, 192, 17, 17), 304)],
)
def test_requests_for_odd_maps(shape: tuple[int, ...], aligned: int, device, launches: list[Any]) -> None:
    for size in (shape, (*shape[:2], aligned)):
        check(inputs(size, torch.bfloat16, device=device))
    counts = [one.stats.requests_read + one.stats.requests_written for one in launches]
    per_element = math.prod(shape[2:]) / aligned
    for odd, even in zip(counts[:2], counts[2:], strict=True):
        assert odd <= REQUESTS * per_element * even


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    cases(*(shape for shape in SHAPES if math.prod(shape) < MOST_SEARCHED), *SEARCHED_TOO),
)
def test_the_planner_is_within_a_tenth_of_tuning(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device, launches: list[Any], monkeypatch
) -> None:
    """By the time that the emulator models."""
    monkeypatch.setattr(search, "MOST_COPIES", 1)  # its L2 is cold before every launch
    x = inputs(shape, dtype, layout, device=device).x
    for direction in ("forward", "backward", "inference"):
        found = search.searched(direction, Size(shape, x.stride(), dtype, x.device))
        print(f"{direction:10} {found.default_us:.2f} us, tuned {found.us:.2f}: {found.choice}")
        assert found.default_us <= 1.1 * found.us


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocked_finds_its_second_pass_in_l2(layout: str, device, launches: list[Any]) -> None:
    case = inputs((16, 32, 112, 112), torch.bfloat16, layout, device=device)
    check(case, "blocked")
    for tensors, one in zip((2, 3), launches, strict=True):
        ideal = tensors * case.x.numel() * 2
        assert one.stats.dram_bytes_read + one.stats.dram_bytes_written <= DRAM * ideal
