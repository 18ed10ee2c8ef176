"""What tuning found, one small JSON file per device: read with suspicion, written whole or not at all.

The user's table is in the platform's cache directory, or where TRITON_BRN_CACHE_DIR says; tables in the
package come second. Nothing in a file is executed, and none is fatal: one that is damaged, or was made by
other versions, is reported once and ignored, and replaced by the next tuning. A shipped one is only logged:
there is nothing that its user could do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .limits import unlawful
from .plans import Choice
from .version import __version__
from .views import View, addressing, power_of_two

_log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "tables"
MOST_BYTES = 4 << 20  # some 20,000 entries
LOCK_SECONDS = 30.0
MOST_US = 1e9  # of a call
DIRECTIONS = ("forward", "backward", "inference")
#: Bytes of an element of x.
ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: The numbers of a choice, in order.
NUMBERS = tuple(field.name for field in dataclasses.fields(Choice)[1:])


@dataclass(frozen=True)
class Entry:
    """What tuning found for one key."""

    choice: Choice | None  # None: nothing is faster than the planner's own plan
    us: float  # microseconds of a call as chosen, when it was tuned
    default_us: float  # and as the planner has it
    finished: bool  # False: the time was up before everything had been tried
    view: View  # that was timed
    #: While not finished: what has been tried, and how many microseconds it took; None: it cannot be chosen.
    tried: tuple[tuple[Choice, float | None], ...] = ()


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
                table = _tables[device, folder] = trusted(device, folder)
        if wanted in table:
            return table[wanted]
    return None


def trusted(device: str, folder: Path) -> dict[str, Entry]:
    """The entries of a device's file; none, and a word of why, if it cannot be trusted."""
    path, message = path_of(device, folder), ""
    entries: dict[str, Entry] = {}
    try:
        entries, refused = read(device, path)
        if refused:
            of = f"{len(refused)} of {len(refused) + len(entries)} entries"
            message = f"tuning table {path}: {of} ignored: {refused[0]}"
    except (OSError, ValueError, RecursionError) as error:
        message = f"tuning table {path} is ignored: {error}"
    if message and folder == SHIPPED:
        _log.debug(message)
    elif message:
        warnings.warn(f"{message}. `python -m triton_brn tune` replaces it", stacklevel=2)
    return entries


def read(device: str, path: Path) -> tuple[dict[str, Entry], list[str]]:
    """The entries of a file, none where there is no file; and what is wrong with those that are refused.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it cannot be trusted.
    """
    try:
        table = contents(path)
    except FileNotFoundError:
        return {}, []
    return entries_of(table, device)


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


def entries_of(table: Any, device: str) -> tuple[dict[str, Entry], list[str]]:
    """The entries of a table, and what is wrong with those that are refused.

    Raises:
        ValueError: it is no table, of another device, or of other versions.
    """
    if not isinstance(table, dict) or not isinstance(table.get("entries"), dict):
        raise ValueError("it is no tuning table")
    for name, here in stamps(device).items():
        if table.get(name) != here:
            raise ValueError(f"{name} is {here!r} here, {str(table.get(name))[:80]!r} there")
    entries, refused = {}, []
    for name, fields in table["entries"].items():
        try:
            entries[name] = entry_of(name, fields)
        except ValueError as error:
            refused.append(str(error))
    return entries, refused


def stamps(device: str) -> dict[str, str]:
    """What a table must agree with."""
    import triton

    minor = ".".join(triton.__version__.split(".")[:2])
    return {"device": device, "triton_brn": __version__, "triton": minor}


def entry_of(name: str, fields: Any) -> Entry:
    """One entry of a table.

    Raises:
        ValueError: it is none, or none that tuning could have found for this key.
    """
    try:
        entry = _entry(**fields)
        direction, dtype, *_ = name.split("/")
        fits = key(direction, dtype, entry.view, ITEMSIZES[dtype]) == name and direction in DIRECTIONS
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"entry {name[:80]!r} is not understood") from None
    if not fits:  # what it says would be timed, whatever memory it takes
        raise ValueError(f"entry {name[:80]!r} is of another size: {tuple(entry.view)}")
    choices = [choice for choice, _ in entry.tried] + ([entry.choice] if entry.choice else [])
    if any(unlawful(choice, direction) for choice in choices):
        raise ValueError(f"entry {name[:80]!r} has a plan that cannot be")
    if entry.us > entry.default_us or (entry.finished and entry.tried):
        raise ValueError(f"entry {name[:80]!r} contradicts itself")
    return entry


def _entry(
    strategy: Any, us: Any, default_us: Any, finished: Any, view: Any, tried: Any = (), **numbers: Any
) -> Entry:
    choice = None
    if strategy != "default" or numbers:
        choice = _choice(strategy, *(numbers.pop(number) for number in NUMBERS))
    if numbers or not isinstance(finished, bool):
        raise ValueError
    others = tuple((_choice(*them), None if t is None else _time(t)) for *them, t in tried)
    return Entry(choice, _time(us), _time(default_us), finished, View(*map(_whole, view)), others)


def _choice(strategy: Any, *numbers: Any) -> Choice:
    if not isinstance(strategy, str) or len(numbers) != len(NUMBERS) or max(map(_whole, numbers)) >= 2**31:
        raise ValueError
    return Choice(strategy, *numbers)


def _whole(n: Any) -> int:
    if type(n) is not int or n < 1:
        raise ValueError
    return n


def _time(t: Any) -> float:
    if not isinstance(t, float) or not 0 < t < MOST_US:
        raise ValueError
    return t


def check_usable(device: str) -> None:
    """Raise OSError where ``save`` could not store what a search finds: ask before it begins."""
    path = path_of(device, directory())
    try:
        with locked(path):
            if os.path.lexists(path) and not path.is_file():
                raise OSError(f"{path} is no file, or cannot be reached")
            with path.open("rb") if path.exists() else nullcontext():
                write_whole(path.with_suffix(".check"), "").unlink()
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"what is found could not be stored in {path}: {error}. TRITON_BRN_CACHE_DIR names another folder"
        ) from error


def save(device: str, found: dict[str, Entry]) -> Path:
    """Add entries to the user's table, beside what other processes put there. Returns its path.

    What another process has finished meanwhile is kept, if it is not finished here.

    Raises:
        OSError: it cannot be read or written, or another process has held its lock for 30 s.
    """
    path = path_of(device, directory())
    with locked(path):
        try:
            entries, _ = read(device, path)
        except (ValueError, RecursionError):
            entries = {}  # look_up has warned of it
        for name, entry in found.items():
            if entry.finished or name not in entries or not entries[name].finished:
                entries[name] = entry
        write(path, {**stamps(device), "entries": {name: as_json(entries[name]) for name in sorted(entries)}})
    with _reading:
        _tables[device, path.parent] = entries
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process writes this table inside the ``with`` block. Makes its folder."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        yield


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as a table has it."""
    choice = {"strategy": "default"} if entry.choice is None else dataclasses.asdict(entry.choice)
    times = {"us": entry.us, "default_us": entry.default_us}
    tried = [[*dataclasses.astuple(other), us] for other, us in entry.tried]
    more = {"tried": tried} if tried else {}
    return {**choice, **times, "finished": entry.finished, "view": entry.view, **more}


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a table, one entry a line, so that whoever reads the file meanwhile sees the old or the new."""
    entries = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table["entries"].items()]
    head = [f"  {json.dumps(name)}: {json.dumps(table[name])}," for name in table if name != "entries"]
    write_whole(path, "\n".join(["{", *head, '  "entries": {', ",\n".join(entries), "  }", "}", ""]))


def write_whole(path: Path, text: str) -> Path:
    """Write a file, all of it or nothing. Whoever does holds the lock."""
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        whole.write_text(text)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
    return path
