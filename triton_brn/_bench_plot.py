"""The benchmark's figures, to be read at 850 pixels: speed-up per layer, bandwidth, scaling with size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from ._bench_cases import DIRECTIONS
from ._bench_peers import OURS
from ._bench_report import number
from ._bench_run import Row

#: Colour (Okabe and Ito: told apart by the colour-blind) and marker of each contestant.
STYLES = {
    OURS: ("#0072B2", "o"),
    "BatchNorm": ("#D55E00", "s"),
    "BatchNorm compiled": ("#E69F00", "^"),
    "BatchNorm compiled coop.": ("#CC79A7", "v"),
    "plain PyTorch": ("#009E73", "D"),
    "plain PyTorch compiled": ("#56B4E9", "P"),
    "torchrl": ("#444444", "X"),
    "sb3-contrib": ("#9A9A9A", "*"),
}
INK, FAINT, LINES = "#222222", "#6A6A6A", "#E2E2E2"
WORDS = {
    "forward": "forward (training)",
    "backward": "backward",
    "both": "forward + backward",
    "inference": "inference",
}
WIDTH, DPI = 8.5, 130
ROOFLINE: dict[str, Any] = {"color": INK, "linewidth": 1.4, "linestyle": (0, (4, 3))}
ROW = 0.44  # inches for an input
SPREAD = 0.055  # of an input's place, from one contestant to the next


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Save speedup.png, bandwidth.png and, of inputs that differ in one size, scaling.png; returns their
    paths, none if nothing was measured."""
    measured = [row for row in rows if row.ms is not None]
    if not measured:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"speedup": speedup, "bandwidth": bandwidth, "scaling": scaling}
    paths = []
    for name, figure_of in figures.items():
        figure = figure_of(measured)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            paths.append(path)
    return paths


def speedup(rows: Sequence[Row]) -> Figure:
    """How many times as fast ours is as each peer, per input."""
    shown = _panels(rows, ("both", "inference"))
    inputs = _inputs(rows)
    figure, axes = _dot_plot(len(inputs), shown, "How many times as fast as its peers triton_brn is", rows)
    for axis, direction in zip(axes, shown, strict=True):
        axis.axvline(1, color=STYLES[OURS][0], linewidth=1.8, zorder=1)
        values = []
        for row in rows:
            faster = row.graph_speedup or row.speedup
            if row.direction == direction and row.peer != OURS and faster:
                values.append(faster)
                _dot(axis, row, faster, inputs)
        _log_axis(axis, values)
        axis.set_xlabel("peer / triton_brn (right of 1x: triton_brn is faster)", color=INK)
    _legend(figure, rows, without=OURS)
    return figure


def bandwidth(rows: Sequence[Row]) -> Figure:
    """GB/s of ideal bytes per input, against a large tensor's copy."""
    shown = _panels(rows, ("forward", "backward"))
    inputs = _inputs(rows)
    title = "Achieved bandwidth, each tensor counted once, against a copy"
    figure, axes = _dot_plot(len(inputs), shown, title, rows)
    copy = rows[0].copy_gbps or 0.0
    for axis, direction in zip(axes, shown, strict=True):
        axis.axvline(copy, **ROOFLINE)
        for row in rows:
            if row.direction == direction and row.best_gbps:
                _dot(axis, row, row.best_gbps, inputs)
        axis.set_xlim(
            0, 1.08 * max([copy, *(row.best_gbps or 0 for row in rows if row.direction == direction)])
        )
        axis.set_xlabel("GB/s", color=INK)
    _legend(figure, rows, copy=copy)
    return figure


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Time against size, over inputs that differ in one size; None of fewer than two."""
    direction = _panels(rows, ("both",))[0]
    name, family = _family([row for row in rows if row.direction == direction])
    if len({row.shape for row in family}) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axis = figure.subplots()
    _title(figure, f"Scaling with size: {WORDS[direction]} of {name}", family)
    for peer in dict.fromkeys(row.peer for row in family):
        points = sorted((row.ideal_mb or 0, row.best_ms or 0) for row in family if row.peer == peer)
        line: dict[str, Any] = {"linewidth": 1.2, "markersize": 7}
        if peer == OURS:
            line = {"linewidth": 2.4, "markersize": 9, "zorder": 4}
        colour, marker = STYLES[peer]
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, **line)
    sizes = sorted({row.ideal_mb or 0 for row in family})
    copy = family[0].copy_gbps or 1.0
    axis.plot(sizes, [mb / copy for mb in sizes], **ROOFLINE)
    axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())
    if sizes[-1] < 20 * sizes[0]:
        axis.set_xticks(sizes, [f"{mb:.3g}" for mb in sizes])
    axis.set_xlabel("bytes that must move, each tensor once (MB)", color=INK)
    axis.set_ylabel("time per call (ms)", color=INK)
    _bare(axis)
    _legend(figure, family, copy=copy)
    return figure


def _family(rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """The most inputs that differ in one size alone, and what they have in common."""
    families: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        sizes = row.shape.split("x")
        for axis, letter in ((0, "N"), (1, "C")):
            common = "x".join([*sizes[:axis], letter, *sizes[axis + 1 :]])
            families.setdefault((common, row.layout, row.dtype), []).append(row)
    (name, layout, dtype), found = max(families.items(), key=lambda item: len({row.shape for row in item[1]}))
    return f"{name} {layout} {dtype}", found


def _panels(rows: Sequence[Row], wanted: Sequence[str]) -> list[str]:
    """Of the wanted directions those that were measured; if none, the first that was."""
    there = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    return [direction for direction in wanted if direction in there] or there[:1]


def _inputs(rows: Sequence[Row]) -> dict[tuple[str, str, str], int]:
    """Each input's place on the axis, the first on top."""
    found = list(dict.fromkeys((row.shape, row.dtype, row.layout) for row in rows))
    return {key: len(found) - 1 - place for place, key in enumerate(found)}


def _dot_plot(
    inputs: int, shown: Sequence[str], title: str, rows: Sequence[Row]
) -> tuple[Figure, Sequence[Any]]:
    """A panel a direction, a line an input."""
    figure = Figure(figsize=(WIDTH, 2.6 + ROW * inputs), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    _title(figure, title, rows)
    places = _inputs(rows)
    dtypes = {dtype for _, dtype, _ in places}
    labels = []
    for shape, dtype, layout in places:
        parts = [shape, dtype if len(dtypes) > 1 else "", "NHWC" if layout == "channels_last" else ""]
        labels.append(" ".join(part for part in parts if part))
    axes[0].set_yticks(list(places.values()), labels)
    for axis, direction in zip(axes, shown, strict=True):
        axis.set_ylim(-0.6, inputs - 0.4)
        axis.set_title(WORDS[direction], fontsize=11, color=INK)
        _bare(axis)
    return figure, axes


def _title(figure: Figure, title: str, rows: Sequence[Row]) -> None:
    one = rows[0]
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    how = "CUDA graphs, cold L2" if one.graph_ms else "CUDA events, cold L2" if one.wall_ms else "wall clock"
    # Two texts of different looks in one place: the empty lines keep room for the second.
    figure.suptitle(f"{title}\n", fontsize=13, color=INK)
    below = f"{one.device}; {dtypes}; median, {how}; torch {one.torch}, Triton {one.triton}"
    if any(row.unsteady for row in rows):
        below += "; hollow: wide spread or busy machine"
    place = 1 - 0.36 / figure.get_figheight()
    figure.text(0.5, place, below, fontsize=9, color=FAINT, ha="center", va="top")


def _bare(axis: Any) -> None:
    axis.tick_params(colors=INK, labelsize=9)
    axis.grid(color=LINES, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _dot(axis: Any, row: Row, value: float, inputs: dict[tuple[str, str, str], int]) -> None:
    colour, marker = STYLES[row.peer]
    names = list(STYLES)  # each has a height of its own: equal values do not hide each other
    place = inputs[row.shape, row.dtype, row.layout] - (names.index(row.peer) - len(names) / 2) * SPREAD
    ours = row.peer == OURS
    look: dict[str, Any] = {
        "s": 70 if ours else 60 if marker == "*" else 44,
        "zorder": 5 if ours else 3,
        "linewidths": 1.2 if row.unsteady else 0.6,
        "facecolors": "white" if row.unsteady else colour,
        "edgecolors": colour if row.unsteady else "white",
    }
    axis.scatter(value, place, marker=marker, **look)


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    """Powers of two, and what lies between where there are few."""
    low, high = min([*values, 1.0]) / 1.15, max([*values, 2.0]) * 1.15
    axis.set_xscale("log", base=2)
    axis.set_xlim(low, high)
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, rows: Sequence[Row], without: str = "", copy: float | None = None) -> None:
    names = [n for n in STYLES if n != without and any(row.peer == n for row in rows)]
    dots: dict[str, Any] = {"linestyle": "", "markersize": 8}
    handles = [Line2D([], [], color=STYLES[n][0], marker=STYLES[n][1], label=n, **dots) for n in names]
    if copy is not None:
        handles.append(Line2D([], [], label=f"a copy, {number(copy)} GB/s", **ROOFLINE))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
