"""What ``tune`` refuses before it searches: places where nothing can be stored, and no Triton to tune for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import triton_brn
from triton_brn import backend, tuning_table
from triton_brn.views import View

pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
from triton_brn import search, tuned

SHAPE = (4, 3, 5, 6)


@pytest.fixture(autouse=True)
def searched(tables: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The searches that begin. None of them takes any time."""
    begun: list[object] = []
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")

    def time(self: search.Scratch, *_: object, **__: object) -> float:
        begun.append(self.view)
        return 100.0

    monkeypatch.setattr(search.Scratch, "time", time)
    return begun


def table_path() -> Path:
    name = tuned.table_name(torch.empty(0, device=DEVICE))
    return tuning_table.path_of(name, tuning_table.directory())


def a_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)


def a_link_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path)


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for whoever is not root."""
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    opened = Path.open

    def refusing(self: Path, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)


def a_folder_that_is_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.write_text("")


def a_folder_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_CACHE_DIR", "/dev/null/here")


def a_folder_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(self: Path, text: str) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_text", refusing)


PLACES = (
    a_folder,
    a_link_loop,
    unreadable,
    a_folder_that_is_a_file,
    a_folder_that_cannot_be_made,
    a_folder_that_cannot_be_written,
)


@pytest.mark.filterwarnings("ignore:tuning table")
@pytest.mark.parametrize("place", PLACES)
def test_a_place_where_nothing_can_be_stored(
    place: Callable[..., None], searched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_brn.__main__ import main

    place(table_path(), monkeypatch)
    with pytest.raises(OSError, match=r"could not be stored in .*TRITON_BRN_CACHE_DIR"):
        triton_brn.tune([SHAPE], device=DEVICE)
    pytest.importorskip("tqdm")
    with pytest.raises(SystemExit, match=r"^tune: .*TRITON_BRN_CACHE_DIR"):
        main(["tune", "--shape", "4,3,5,6", "--device", str(DEVICE)])
    assert not searched


def test_a_place_that_is_usable_is_left_as_it_was(tables: Path) -> None:
    name = tuned.table_name(torch.empty(0, device=DEVICE))
    tuning_table.check_usable(name)
    assert [p.suffix for p in tables.iterdir()] == [".lock"]
    table_path().write_text("damaged, and replaced by tuning")
    tuning_table.check_usable(name)
    assert table_path().read_text() == "damaged, and replaced by tuning"


def test_a_size_that_does_not_fit_its_key_is_not_allocated(searched: list) -> None:
    """Its view would take 16 TB."""
    triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    path = table_path()
    table = json.loads(path.read_text())
    (entry,) = table["entries"].values()
    entry |= {"finished": False, "view": [2**21, 3, 2**21]}
    path.write_text(json.dumps(table))
    tuning_table._tables.clear()
    searched.clear()
    with pytest.warns(UserWarning, match="1 of 1 entries ignored: .* of another size"):
        (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert result.finished
    assert set(searched) == {View(4, 3, 30)}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from triton_brn.__main__ import main
main(["tune", "--shape", "4,3"])
"""


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_without_triton_one_line_says_so(choice: str) -> None:
    root = Path(triton_brn.__file__).parents[1]
    environment = {**os.environ, "TRITON_BRN_BACKEND": choice, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tune: ")
    assert "triton cannot be imported" in line


@pytest.mark.parametrize("value", ["yes", "true", "2", "on", " 1"])
def test_values_of_autotune_that_are_none(value: str, monkeypatch: pytest.MonkeyPatch, tables: Path) -> None:
    from triton_brn import launch

    launch.forget_calls()
    layer = triton_brn.BatchRenorm2d(3).to(DEVICE)
    before = layer.running_mean.clone()
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"^TRITON_BRN_AUTOTUNE: expected 1 or 0, got '{value}'"):
        layer(torch.randn(SHAPE, device=DEVICE))
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(("value", "tunes"), [("1", True), ("0", False), ("", False)])
def test_values_of_autotune(value: str, tunes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", value)
    assert backend.autotunes() == tunes
