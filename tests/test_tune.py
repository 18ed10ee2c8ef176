"""What ``tune`` and ``python -m triton_brn tune`` say, and refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import triton_brn
from triton_brn import BatchRenorm2d, planner, tuning_table

pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

SHAPE = (4, 3, 5, 6)


@pytest.fixture(autouse=True)
def _fresh(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")


class Unreached(torch.nn.Module):
    """A model that does not call its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BatchRenorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("error", "name", "arguments", "options"),
    [
        (ValueError, "model_or_shapes", [[(3,)]], {}),
        (ValueError, "model_or_shapes", [[(3, 0)]], {}),
        (ValueError, "model_or_shapes", [torch.nn.Linear(2, 2), torch.ones(2)], {}),
        (TypeError, "model_or_shapes", [(4, 3, 5, 6)], {}),
        (TypeError, "model_or_shapes", [5], {}),
        (ValueError, "inputs", [Unreached(), torch.ones(2)], {}),
        (TypeError, "inputs", [[SHAPE], torch.ones(2)], {}),
        (TypeError, "dtype", [[SHAPE]], {"dtype": torch.int32}),
        (ValueError, "channels_last", [[(3, 4)]], {"channels_last": True}),
        (ValueError, "directions", [[SHAPE]], {"directions": ["sideways"]}),
        (ValueError, "budget", [[SHAPE]], {"budget": 0}),
    ],
)
def test_errors_name_the_argument(error, name: str, arguments: list, options: dict) -> None:
    with pytest.raises(error, match=f"^{name}:"):
        triton_brn.tune(*arguments, **options)


def test_nothing_is_tuned_where_a_strategy_is_forced() -> None:
    with planner.forced_strategy("two_launch"), pytest.raises(RuntimeError, match="nothing to choose"):
        triton_brn.tune([SHAPE], device=DEVICE)


def test_what_plain_pytorch_serves_cannot_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "eager")
    with pytest.raises(RuntimeError, match="nothing to tune on cpu"):
        triton_brn.tune([SHAPE], device="cpu")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    from triton_brn.__main__ import main

    command = ["tune", "--shape", "4,3,5,6", "--shape", "6,40", "--dtype", "fp32", "--device", str(DEVICE)]
    main(command)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 6 + 1
    assert out[1].split()[:4] == ["forward", "4x3x5x6", "float32", "contiguous"]
    assert out[-1].startswith(f"Table: {tuning_table.directory()}")
    main(command)
    assert capsys.readouterr().out.count("in the table already") == 6
    with pytest.raises(SystemExit):
        main(["tune", "--shape", "4,x"])
    assert "--shape" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^tune: .+"):
        main(["tune", "--shape", "4,3", "--device", "xpu"])
    with pytest.raises(SystemExit, match="budget: expected more"):
        main(["tune", "--budget", "0"])


def test_a_missing_progress_bar_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_brn.__main__ import main

    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"pip install 'triton_brn\[tune\]'"):
        main(["tune", "--shape", "4,3", "--device", str(DEVICE)])
