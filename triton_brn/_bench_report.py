"""What a benchmark leaves behind: CSV and JSON files, and a table on the terminal."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ._bench_peers import OURS
from ._bench_run import Row


def write(rows: Sequence[Any], folder: Path, name: str) -> list[Path]:
    """``name``.csv and ``name``.json of dataclass rows, the same columns in both."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [dataclasses.asdict(row) for row in rows]
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    paths[1].write_text(json.dumps(records, indent=1) + "\n")
    return paths


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, no exponent; a dash for None."""
    if value is None:
        return "-"
    whole = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - whole)}f}"


def by_input(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Rows by input and direction, then by contestant, in the order they were measured."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.layout, row.direction), {})[row.peer] = row
    return found


def names_of(rows: Iterable[Row]) -> list[str]:
    """Contestants, ours first, without those of which nothing was measured."""
    return list(dict.fromkeys(row.peer for row in rows if row.ms is not None))


def plan_of(row: Row) -> str:
    """Our strategy, and whose plan it is unless it is the planner's."""
    return row.strategy + (f" ({row.planned_by})" if row.planned_by not in ("", "planner") else "")


#: Marks times that are not to be trusted, see ``Row.unsteady``.
UNSTEADY = "?"

#: Heading and cell of what the table says of ours; those that no row has are left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "plan": plan_of,
    "ms": lambda row: number(row.ms) + UNSTEADY * bool(row.unsteady),
    "20 %": lambda row: number(row.ms_q20),
    "80 %": lambda row: number(row.ms_q80),
    "graph\nms": lambda row: number(row.graph_ms),
    "wall\nms": lambda row: number(row.wall_ms),
    "GB/s": lambda row: number(row.best_gbps),
    "%\ncopy": lambda row: number(row.graph_copy_percent or row.copy_percent, 2),
    "laun-\nches": lambda row: "-" if row.launches is None else str(row.launches),
    "MiB": lambda row: number(row.peak_mib),
}


def print_tables(rows: Sequence[Row]) -> None:
    """Our times, one line a direction of an input; then how many times as fast as each peer they are."""
    ours = [row for row in rows if row.peer == OURS]
    used = {name: cell for name, cell in COLUMNS.items() if any(cell(row).strip("-") for row in ours)}
    peers = {name: _faster_than(name) for name in names_of(rows) if name != OURS}
    groups = by_input(rows)
    print_table(heading(rows), groups, {k: _of_ours(cell) for k, cell in used.items()}, left=("plan",))
    title = "How many times as fast as each peer (by ms above, median over rounds)"
    print_table(title, groups, {name.replace(" ", "\n"): cell for name, cell in peers.items()})
    for line in notes(rows):
        print(line)


Group = dict[str, Row]


def _of_ours(cell: Callable[[Row], str]) -> Callable[[Group], str]:
    return lambda group: cell(group[OURS]) if OURS in group else "-"


def _faster_than(peer: str) -> Callable[[Group], str]:
    def cell(group: Group) -> str:
        if peer not in group:
            return "-"
        unsteady = group[peer].unsteady or (OURS in group and group[OURS].unsteady)
        return number(group[peer].speedup) + UNSTEADY * bool(unsteady)

    return cell


def print_table(
    title: str,
    groups: dict[tuple[str, str, str, str], Group],
    columns: dict[str, Callable[[Group], str]],
    left: Sequence[str] = (),
) -> None:
    """A line for each group, a section for each input."""
    lines: list[tuple[str, ...]] = []
    sections = []
    before = ""
    for (shape, dtype, layout, direction), group in groups.items():
        name = f"{shape} {dtype}" + (" NHWC" if layout == "channels_last" else "")
        if before and before != name:
            sections.append(len(lines) - 1)
        lines.append(("" if name == before else name, direction, *(cell(group) for cell in columns.values())))
        before = name
    show(title, ("input", "direction", *columns), lines, ("input", "direction", *left), sections)


def show(
    title: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    left: Sequence[str],
    sections: Sequence[int] = (),
) -> None:
    """Print a table; ``left``: columns of text, ``sections``: lines that end one."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for place, cells in enumerate(lines):
        table.add_row(*cells, end_section=place in sections)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for all of it
        wide = Measurement.get(console, console.options.update(width=1000), table).maximum
        console.width = max(wide, *map(len, title.splitlines()))
    console.print(table)


def print_models(rows: Sequence[Any]) -> None:
    """Whole networks, see ``_bench_models.ModelRow``."""
    one = rows[0]
    columns = ("batch", "layers", "ms", "20 %", "80 %", "images/s", "peak MiB", "x")
    lines = [
        (
            str(row.batch),
            row.peer,
            *(number(v) for v in (row.ms, row.ms_q20, row.ms_q80, row.images_per_second, row.peak_mib)),
            number(row.speedup),
        )
        for row in rows
    ]
    title = (
        f"{one.model}: training step on {one.image}x{one.image} images, {one.dtype}, {one.layout}\n"
        f"{one.device}; torch {one.torch}, Triton {one.triton}, triton_brn {one.triton_brn}\n"
        "ms: wall clock, median and quantiles. x: how many times as fast triton_brn is."
    )
    show(title, columns, lines, ("batch", "layers"))


def heading(rows: Sequence[Row]) -> str:
    """What the numbers are and belong to."""
    row = rows[0]
    cuda = row.wall_ms is not None
    packages = dict.fromkeys(row.package for row in rows if row.package)
    lines = [
        f"triton_brn {row.triton_brn} on {row.device}",
        f"torch {row.torch}, Triton {row.triton}, Python {row.python}",
        *([", ".join(packages)] if packages else []),
        f"ms: median by {'device events, L2 cold' if cuda else 'wall clock'}, and its quantiles.",
        f"GB/s: each tensor counted once; a copy reaches {number(row.copy_gbps)}.",
    ]
    if cuda:
        lines.append("graph ms: replay of a CUDA graph, no host. wall ms: back to back, as the host sees it.")
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why, once for each contestant and reason."""
    inputs: dict[tuple[str, str], set[tuple[str, str, str]]] = {}
    for row in rows:
        if row.note:
            inputs.setdefault((row.peer, row.note), set()).add((row.shape, row.dtype, row.layout))
    everywhere = len({(row.shape, row.dtype, row.layout) for row in rows})
    lines = []
    if any(row.unsteady for row in rows):
        lines.append(f"{UNSTEADY}: a spread (20 to 80 %) above a quarter of the median, or a busy machine")
    for (peer, note), where in inputs.items():
        which = "" if len(where) == everywhere else f" ({len(where)} of {everywhere} inputs)"
        lines.append(f"{peer}: {note}{which}")
    return lines
