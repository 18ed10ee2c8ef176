"""The tables that tuning writes: damage and other versions are reported once, two writers lose nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from triton_brn import tuning_table
from triton_brn.plans import Choice
from triton_brn.tuning_table import Entry
from triton_brn.views import View

pytest.importorskip("triton", reason="Triton is not installed")

NAME = "NVIDIA Something 80GB"
CHOICE = Choice("cluster", 4096, 8, 4, 2, 512, 1, 1)
VIEW = View(32, 64, 3136)
A, B, C, D = (
    tuning_table.key(direction, dtype, VIEW, 2)
    for direction in ("forward", "backward")
    for dtype in ("bfloat16", "float16")
)
ENTRY = Entry(CHOICE, 9.5, 10.0, True, VIEW)
DEFAULT = Entry(None, 10.0, 10.0, True, VIEW)
BEGUN = Entry(None, 10.0, 10.0, False, VIEW, ((CHOICE, 9.9), (dataclasses.replace(CHOICE, warps=8), None)))


@pytest.fixture(autouse=True)
def folder(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning_table, "SHIPPED", tmp_path / "shipped")
    return tables


def forget() -> None:
    """As a new process would begin."""
    tuning_table._tables.clear()


def assert_silent(key: str, entry: Entry | None, what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_table.look_up(NAME, key) == entry, what


def test_what_was_saved_is_found() -> None:
    path = tuning_table.save(NAME, {A: ENTRY, B: DEFAULT, C: BEGUN})
    forget()
    assert tuning_table.look_up(NAME, A) == ENTRY
    assert tuning_table.look_up(NAME, B) == DEFAULT
    assert tuning_table.look_up(NAME, C) == BEGUN
    assert tuning_table.look_up(NAME, D) is None
    assert tuning_table.look_up("another device", A) is None
    assert path.name == "NVIDIA_Something_80GB.json"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".lock"], "nothing is left behind"


def test_another_process_finds_it_and_adds_to_it() -> None:
    tuning_table.save(NAME, {A: ENTRY})
    forget()
    tuning_table.save(NAME, {B: DEFAULT, A: DEFAULT})
    forget()
    assert tuning_table.look_up(NAME, A) == tuning_table.look_up(NAME, B) == DEFAULT


def test_what_is_finished_stays_so() -> None:
    """Another process may have finished what this one has only begun."""
    tuning_table.save(NAME, {A: BEGUN, B: ENTRY})
    tuning_table.save(NAME, {A: dataclasses.replace(BEGUN, us=9.0), B: BEGUN})
    forget()
    assert tuning_table.look_up(NAME, A) == dataclasses.replace(BEGUN, us=9.0)
    assert tuning_table.look_up(NAME, B) == ENTRY


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (tuning_table, "contents", OSError(5, "Input/output error")),  # what is there cannot be read
        (os, "replace", OSError(28, "No space left on device")),
    ],
)
def test_a_save_that_fails_leaves_the_old_table(where, name: str, error: OSError, monkeypatch) -> None:
    path = tuning_table.save(NAME, {A: ENTRY})
    before = path.read_bytes()

    def fails(*_: Path) -> None:
        assert path.read_bytes() == before, "the new table is written elsewhere"
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(where, name, fails)
        with pytest.raises(OSError, match=error.strerror):
            tuning_table.save(NAME, {B: ENTRY})
    assert path.read_bytes() == before
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".lock"], "nothing is left behind"


def test_the_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv("TRITON_BRN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert tuning_table.directory() == Path(platformdirs.user_cache_dir("triton_brn", appauthor=False))
    assert tuning_table.directory().name == "triton_brn"


def test_a_shipped_table_of_other_versions_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tuning_table.SHIPPED.mkdir()
    tuning_table.path_of(NAME, tuning_table.SHIPPED).write_text("[]")
    with caplog.at_level(logging.DEBUG, logger="triton_brn"):
        assert_silent(A, None, "its user can do nothing")
    assert "is ignored: it is no tuning table" in caplog.text


def test_the_users_table_comes_before_the_shipped_one(folder: Path) -> None:
    path = tuning_table.save(NAME, {A: ENTRY, B: ENTRY})
    tuning_table.SHIPPED.mkdir()
    path.rename(tuning_table.SHIPPED / path.name)
    tuning_table.save(NAME, {A: DEFAULT})
    forget()
    assert tuning_table.look_up(NAME, A) == DEFAULT
    assert tuning_table.look_up(NAME, B) == ENTRY


def test_keys_are_buckets_of_sizes() -> None:
    def key(*view: int) -> str:
        return tuning_table.key("forward", "bfloat16", View(*view), 2)

    assert key(32, 64, 3136) == "forward/bfloat16/aligned/131072/64"
    assert key(40, 50, 3136) == key(32, 64, 3136)
    assert key(32, 65, 3136) != key(32, 64, 3136)
    assert key(42, 64, 3136) != key(32, 64, 3136)
    assert key(100352, 64, 1) == "forward/bfloat16/rows/131072/64"
    assert key(4, 64, 1225).split("/")[2] == "window"


def saved() -> tuple[Path, dict]:
    path = tuning_table.save(NAME, {A: ENTRY})
    forget()
    return path, json.loads(path.read_text())


OTHER = dataclasses.astuple(dataclasses.replace(CHOICE, strategy="two_launch", ctas=1))
FAULTS = {
    "strategy": "os.system('true')",
    "block": -1,
    "warps": "4",
    "ctas": True,
    "slots": 2**40,
    "splits": None,
    "stages": 0,
    "us": float("nan"),
    "default_us": "fast",
    "finished": 1,
    "view": [32, 64],
    "tried": [["cluster", 1, 2]],
    "more": 1,
}
FAULTS_OF_TIMES = (0.0, -1.0, float("inf"), 10**400, True, 1e300)
FAULTS_OF_VIEWS = (
    [32, 64, 0],
    [32, 64, 1.0],
    "abc",
    3,
    None,
    [2**20, 64, 2**20],
    [32, 65, 3136],
    [100352, 64, 1],
)
FAULTS_OF_PLANS = {"strategy": "two_launch", "block": 3, "warps": 5, "stages": 2, "ctas": 12, "us": 11.0}
FAULTS_OF_TRIALS = (
    1,
    [1],
    [[*dataclasses.astuple(CHOICE), 0.0]],
    [[*dataclasses.astuple(CHOICE), "1"]],
    [[]],
    [[*OTHER, 1.0]],  # of a search that is finished
    [[*dataclasses.astuple(dataclasses.replace(CHOICE, stages=2)), 1.0]],
)


def damaged() -> dict[str, bytes]:
    """Contents that no table has, by what is wrong with them."""
    path, table = saved()
    text = path.read_bytes()
    path.unlink()
    contents = {
        "truncated": text[: len(text) // 2],
        "empty": b"",
        "binary": bytes(range(256)),
        "a list": b"[]",
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "deep": b"[" * 200_000,
        "large": b" " * (tuning_table.MOST_BYTES + 1),
        "long number": b'{"entries": ' + b"9" * 10_000 + b"}",
        "entries": json.dumps({**table, "entries": [1]}).encode(),
        "an entry": json.dumps({**table, "entries": {A: 1}}).encode(),
        "no stamps": json.dumps({"entries": table["entries"]}).encode(),
    }
    for name in ("device", "triton_brn", "triton"):
        contents[f"other {name}"] = json.dumps({**table, name: "0.0.1"}).encode()
    faults = [*FAULTS.items()]
    faults += [(name, time) for name in ("us", "default_us") for time in FAULTS_OF_TIMES]
    faults += [*FAULTS_OF_PLANS.items()]
    faults += [("view", view) for view in FAULTS_OF_VIEWS] + [("tried", them) for them in FAULTS_OF_TRIALS]
    for field, value in faults:
        entries = {A: {**table["entries"][A], field: value}}
        contents[f"{field} {str(value)[:40]} of an entry"] = json.dumps(
            {**table, "entries": entries}
        ).encode()
    return contents


def test_what_cannot_be_trusted_is_reported_once_and_ignored() -> None:
    for what, content in damaged().items():
        path = tuning_table.path_of(NAME, tuning_table.directory())
        path.write_bytes(content)
        forget()
        with pytest.warns(UserWarning, match="ignored"):
            assert tuning_table.look_up(NAME, A) is None, what
        assert_silent(A, None, what)
        tuning_table.save(NAME, {B: ENTRY})
        forget()
        assert_silent(B, ENTRY, f"{what}: not replaced")


def test_one_entry_that_is_wrong_takes_none_with_it() -> None:
    path, table = saved()
    good, wrong = table["entries"][A], {**table["entries"][A], "view": [2**20, 64, 2**20]}
    path.write_text(json.dumps({**table, "entries": {A: wrong, B: good, "forward": good, "x/y/z": good}}))
    with pytest.warns(
        UserWarning, match=r"3 of 4 entries ignored: entry '.*' is of another size: \(1048576, "
    ):
        assert tuning_table.look_up(NAME, A) is None
    assert_silent(B, ENTRY, "it is right")
    tuning_table.save(NAME, {C: DEFAULT})
    forget()
    assert_silent(B, ENTRY, "it is kept")
    assert set(json.loads(path.read_text())["entries"]) == {B, C}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(tuning_table.path_of(NAME, folder))
    with pytest.warns(UserWarning, match="it is no file"):
        assert tuning_table.look_up(NAME, A) is None


def test_a_folder_that_cannot_be_made_is_an_error_of_saving_only(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="ignored"):
        assert tuning_table.look_up(NAME, A) is None
    with pytest.raises(OSError, match="cache"):
        tuning_table.save(NAME, {A: ENTRY})


DTYPES = ("float32", "float16", "bfloat16")
WRITER = """
import sys
from triton_brn import tuning_table
from triton_brn.tuning_table import ITEMSIZES, Entry, key
from triton_brn.views import View
for i in range(20):
    view, dtype = View(32, 2**i, 16), sys.argv[1]
    name = key("forward", dtype, view, ITEMSIZES[dtype])
    tuning_table.save("device", {name: Entry(None, 1.0, 1.0, True, view)})
"""


def test_processes_that_write_at_once_lose_nothing() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in DTYPES]
    assert [writer.wait(timeout=300) for writer in writers] == [0] * len(DTYPES)
    sizes = tuning_table.ITEMSIZES
    keys = [tuning_table.key("forward", t, View(32, 2**i, 16), sizes[t]) for t in DTYPES for i in range(20)]
    assert all(tuning_table.look_up("device", key) for key in keys)
