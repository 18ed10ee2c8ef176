"""What tuning found, one small JSON file per device: read with suspicion, written whole or not at all.

The user's table is in the platform's cache directory, or where TRITON_BRN_CACHE_DIR says; tables in the
package come second. Nothing in a file is executed, and none is fatal: one that is damaged, or was made by
other versions, is reported once and ignored, and replaced by the next tuning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .candidates import Choice
from .planner import STRATEGIES
from .version import __version__
from .views import View, addressing, power_of_two

SHIPPED = Path(__file__).parent / "tables"
MOST_BYTES = 4 << 20  # some 20,000 entries
LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Entry:
    """What tuning found for one key."""

    choice: Choice | None  # None: nothing is faster than the planner's own plan
    us: float  # microseconds of a call as chosen, when it was tuned
    default_us: float  # and as the planner has it
    finished: bool  # False: the time was up before everything had been tried


def key(direction: str, dtype: str, view: View, itemsize: int) -> str:
    """What a choice is good for: sizes count by the power of two that they are below.

    The layout is the tile's shape, see views.Tile: "aligned", "window", "folded" or "rows".
    """
    layout = addressing(view, itemsize).shape
    sizes = (power_of_two(view.outer * view.inner), power_of_two(view.channels))
    return "/".join((direction, dtype, layout, *map(str, sizes)))


def directory() -> Path:
    """Where the user's tables are."""
    given = os.environ.get("TRITON_BRN_CACHE_DIR")
    if given:
        return Path(given)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("triton_brn", appauthor=False))


def path_of(device: str, folder: Path) -> Path:
    """The file of a device in a folder of tables."""
    return folder / (re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json")


_tables: dict[tuple[str, Path], dict[str, Entry]] = {}
_reading = threading.Lock()


def look_up(device: str, wanted: str) -> Entry | None:
    """What is known of a key on a device. Files are read once per process."""
    for folder in (directory(), SHIPPED):
        with _reading:
            table = _tables.get((device, folder))
            if table is None:
                table = _tables[device, folder] = read(device, path_of(device, folder))
        if wanted in table:
            return table[wanted]
    return None


def read(device: str, path: Path, warn: bool = True) -> dict[str, Entry]:
    """The entries of a file; none, and a warning, if it cannot be trusted."""
    try:
        return entries_of(contents(path), device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if not warn:
            return {}
        message = f"tuning table {path} is ignored: {error}. `python -m triton_brn tune` replaces it"
        warnings.warn(message, stacklevel=2)
        return {}


def contents(path: Path) -> Any:
    """What a file of JSON says.

    Raises:
        OSError, ValueError, RecursionError: there is none, or it is none.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise ValueError("it is no file")
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    return json.loads(text.decode())


def entries_of(table: Any, device: str) -> dict[str, Entry]:
    """The entries of a table.

    Raises:
        ValueError: it is no table, of another device, or of other versions.
    """
    if not isinstance(table, dict) or not isinstance(table.get("entries"), dict):
        raise ValueError("it is no tuning table")
    for name, here in stamps(device).items():
        if table.get(name) != here:
            raise ValueError(f"{name} is {here!r} here, {str(table.get(name))[:80]!r} there")
    return {str(name): entry_of(name, fields) for name, fields in table["entries"].items()}


def stamps(device: str) -> dict[str, str]:
    """What a table must agree with."""
    import triton

    minor = ".".join(triton.__version__.split(".")[:2])
    return {"device": device, "triton_brn": __version__, "triton": minor}


def entry_of(name: str, fields: Any) -> Entry:
    """One entry of a table.

    Raises:
        ValueError: it is none.
    """
    fault = ValueError(f"entry {name[:80]!r} is not understood")
    if not isinstance(fields, dict):
        raise fault
    fields = dict(fields)
    us, default_us, finished = (fields.pop(field, None) for field in ("us", "default_us", "finished"))
    times = all(isinstance(t, float) and math.isfinite(t) and t >= 0 for t in (us, default_us))
    if not times or not isinstance(finished, bool):
        raise fault
    strategy = fields.pop("strategy", None)
    if strategy == "default" and not fields:
        return Entry(None, us, default_us, finished)
    names = [field.name for field in dataclasses.fields(Choice)[1:]]
    whole = all(type(fields.get(number)) is int and 0 < fields[number] < 2**31 for number in names)
    if strategy not in STRATEGIES or len(fields) != len(names) or not whole:
        raise fault
    return Entry(Choice(strategy, **fields), us, default_us, finished)


def save(device: str, found: dict[str, Entry]) -> Path:
    """Add entries to the user's table, beside what other processes put there. Returns its path.

    Raises:
        OSError: it cannot be written, or another process has held its lock for 30 s.
    """
    from filelock import FileLock

    path = path_of(device, directory())
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        entries = read(device, path, warn=False) | found  # look_up has warned of a table that is replaced
        write(path, {**stamps(device), "entries": {name: as_json(entries[name]) for name in sorted(entries)}})
    with _reading:
        _tables[device, path.parent] = entries
    return path


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as a table has it."""
    choice = {"strategy": "default"} if entry.choice is None else dataclasses.asdict(entry.choice)
    times = {"us": entry.us, "default_us": entry.default_us}
    return {**choice, **times, "finished": entry.finished}


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a table, one entry a line, so that whoever reads the file meanwhile sees the old or the new."""
    entries = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table["entries"].items()]
    head = [f"  {json.dumps(name)}: {json.dumps(table[name])}," for name in table if name != "entries"]
    text = "\n".join(["{", *head, '  "entries": {', ",\n".join(entries), "  }", "}", ""])
    whole = path.with_suffix(f".{os.getpid()}.tmp")  # whoever writes holds the lock
    try:
        whole.write_text(text)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
