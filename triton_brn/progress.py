"""What a long command shows while it runs, and how it asks for packages that are not installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable
from typing import Any

#: Seconds from one line to the next where nobody watches: a log of an hour is 60 lines.
LINE_SECONDS = 60.0


def bar(total: int, unit: str) -> Any:
    """A tqdm bar on a terminal. Where standard error is a file or a pipe, a line a minute in its place."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, smoothing=0.1)

    class Lines(tqdm):  # type: ignore[misc]
        fp: Any
        sp: Any
        said = -LINE_SECONDS

        def display(self, *args: Any, **options: Any) -> None:
            now = time.monotonic()
            if now - self.said >= LINE_SECONDS:
                self.said = now
                print(self.format_meter(**{**self.format_dict, "ncols": 0}), file=self.fp, flush=True)

        def close(self) -> None:
            if self.fp is not None:  # tqdm closes again when it is deleted
                self.said = -LINE_SECONDS
                self.display()
                self.sp = self.fp = None  # nothing to clear
            super().close()

    return Lines(total=total, unit=unit, smoothing=0.1, mininterval=1.0)


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require(command: str, packages: Iterable[str]) -> None:
    """End the program unless the packages of this command's extra are installed.

    Raises:
        SystemExit: some are missing; the message says how to get them.
    """
    if names := missing(packages):
        raise SystemExit(f"{command} needs {', '.join(names)}: {how_to_install(command)}")


def how_to_install(extra: str) -> str:
    """The command that installs an extra, in a project that uses triton_brn and in a checkout of it."""
    return f"pip install 'triton_brn[{extra}]', in a checkout pip install '.[{extra}]'"


def minutes(seconds: float) -> str:
    """ "40 s", "6 minutes": how long something takes, to be read."""
    return f"{max(5, round(seconds / 5) * 5)} s" if seconds < 100 else f"{round(seconds / 60)} minutes"
