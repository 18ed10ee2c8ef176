"""A forward from the numbers that the first one saved writes the same y, to the bit."""

from __future__ import annotations

import pytest
import torch
from reference import LAYOUTS, ODD_LAYOUTS, inputs, lay_out

from triton_brn import eager as plain
from triton_brn import forced_strategy

#: On both sides of what plain PyTorch decides by.
SHAPES = [(8, 6), (4, 6, 5), (2, 6, 4, 4), (2, 6, 3, 2, 2), (2, 64, 32, 33), (2048, 128)]
SETTINGS = (0.1, 1e-5, [3.0, 3.0, 0.0, 1.0], [5.0, 5.0, 0.0, 1.0], True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["near", "far", "no affine"])
def test_plain_pytorch(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    for layout in (*LAYOUTS, *ODD_LAYOUTS) if len(shape) > 3 else ("contiguous",):
        case = inputs(shape, dtype=dtype, affine=kind != "no affine")
        x = lay_out(case.x + 1e4 if kind == "far" else case.x, layout)
        first, saved = plain.forward(
            x, case.weight, case.bias, case.running_mean, case.running_var, None, *SETTINGS
        )
        again = plain.again(x, saved)
        assert again.stride() == first.stride()
        torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 17), (3, 4, 6, 6), (2, 3, 7, 7), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("strategy", ["resident", "cooperative", "two_launch"])
def test_kernels(
    strategy: str, shape: tuple[int, ...], dtype: torch.dtype, device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
    if strategy == "cooperative" and not launch.device_of(torch.empty(1, device=device)).waits:
        pytest.skip("cooperative: programs run one after another")
    for layout in LAYOUTS if len(shape) > 3 else ("contiguous",):
        case = inputs(shape, dtype=dtype, layout=layout, device=device)
        with forced_strategy(strategy):
            first, saved = launch.forward(
                case.x, case.weight, case.bias, case.running_mean, case.running_var, None, *SETTINGS
            )
        again, _ = launch.again(case.x, case.weight, case.bias, saved)
        assert again.stride() == first.stride()
        if strategy != "cooperative":
            torch.testing.assert_close(again, first, rtol=0, atol=0)
        else:  # centres each split on its own mean, which nobody kept
            torch.testing.assert_close(again, first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (4, 32, 35, 35)], ids=str)
def test_kernels_read_x_and_write_y(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device, request: pytest.FixtureRequest
) -> None:
    launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
    try:
        launches = request.getfixturevalue("emulated_launches")
    except pytest.FixtureLookupError:
        pytest.skip("needs an emulator that counts what a kernel moves")
    case = inputs(shape, dtype=dtype, layout=layout, device=device)
    first, saved = launch.forward(
        case.x, case.weight, case.bias, case.running_mean, case.running_var, None, *SETTINGS
    )
    del launches[:]
    again, _ = launch.again(case.x, case.weight, case.bias, saved)
    assert len(launches) == 1
    stats = launches[0].stats
    assert stats.dram_bytes_read + stats.dram_bytes_written <= 1.05 * 2 * case.x.nbytes
    torch.testing.assert_close(again, first)
