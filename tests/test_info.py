"""``python -m triton_brn info``."""

from __future__ import annotations

import pytest
import torch
from reference import inputs

from triton_brn import views
from triton_brn.__main__ import main
from triton_brn.info import EXAMPLE, info, view_of_shape

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 7), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_views_are_those_of_tensors(shape: tuple[int, ...], layout: str) -> None:
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("channels_last is for maps and volumes")
    x = inputs(shape, torch.float32, layout).x
    assert view_of_shape(shape, layout == "channels_last") == views.view_of(x.shape, x.stride())


def test_plans_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--shape", "32,64,56,56", "--dtype", "bf16"])
    said = capsys.readouterr().out
    assert f"(32, 64, 56, 56), bf16, contiguous on {EXAMPLE.name}" in said
    assert "forward    cluster: 1 launch, grid 64 x 1 x 8, 4 warps, tile 16384 x 8 (aligned)" in said
    assert "resident: no, a channel group takes 131,072 elements" in said
    assert "inference  apply: 1 launch" in said
    assert "rows" in info((32, 64, 56, 56), "bf16", channels_last=True)


@pytest.mark.parametrize("shape", ["32", "0,3", "a,b"])
def test_bad_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--shape", shape])
    assert "argument --shape" in capsys.readouterr().err
