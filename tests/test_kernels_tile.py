"""Where tiles lie in tensors that are too large to allocate."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from triton_brn import planner
from triton_brn.plans import Device
from triton_brn.views import View, length

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")
from triton_brn.kernels.tile import locate  # noqa: E402


@triton.jit
def located(offsets, start, stop, channels, inner, T: tl.constexpr):
    """Store where the tile of channel 0 at ``start`` lies, -1 where it is masked."""
    place, inside = locate(start + tl.zeros([], tl.int64), stop, 0, channels, inner, T)
    at = tl.arange(0, T.block)[:, None] * T.width + tl.arange(0, T.width)[None, :]
    tl.store(offsets + at, tl.where(inside, place, -1))


@pytest.mark.parametrize("inner", [2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33 + 4])
def test_maps_of_more_than_2_32_elements(inner: int) -> None:
    """The first tiles and the last one of a single map."""
    view = View(1, 1, inner)
    tile = planner.plan("inference", view, 2, Device("", sms=1)).tile
    stop = length(view, tile)
    assert tile.wide
    offsets = torch.empty(tile.elements, dtype=torch.long, device=DEVICE)
    for start in (0, 1000, stop - 100):
        located[(1,)](offsets, start, stop, 1, inner, T=tile)
        expected = start * tile.vec + torch.arange(tile.elements, device=DEVICE)
        assert torch.equal(offsets, torch.where(expected < inner, expected, -1))
