"""The demo's figure: one panel a setting, one curve a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from ._demo_train import (
    BATCH,
    METHODS,
    SETTINGS,
    Run,
    Setting,
    classes_of,
    draw_batch,
    evaluation_steps,
    load,
)
from .demo import by_method

COLOURS = {"BN": "#D55E00", "BRN": "#0072B2"}  # Okabe and Ito: told apart by the colour-blind
INK, FAINT = "#222222", "#767676"


def check_format(path: Path) -> None:
    """Raise ValueError unless a figure can be saved in the format that the file name asks for."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"expected a name that ends with .{', .'.join(sorted(formats))}, got {path}")


def draw(curves: dict[Run, list[float]], path: Path) -> None:
    """Save the figure; the format is the file name's."""
    steps, seeds = next(iter(curves)).steps, len({run.seed for run in curves})
    figure = Figure(figsize=(10, 5.2), layout=ConstrainedLayoutEngine(rect=(0, 0.045, 1, 0.955), wspace=0.02))
    grid = figure.subplots(2, len(SETTINGS), height_ratios=(1, 5), squeeze=False)
    figure.suptitle("Batch Renormalization learns from minibatches that break BatchNorm", fontsize=15)
    for column, setting in enumerate(SETTINGS):
        strip, panel = grid[:, column]
        _examples(strip, setting)
        _curves(panel, curves, setting, steps)
        panel.tick_params(labelleft=column == 0)
        panel.set_xlabel(f"training step of {BATCH} images", color=INK)
    grid[1, 0].set_ylabel("accuracy on held-out digits (%)", color=INK)
    figure.text(
        0.5,
        0.012,
        "Small CNN on 5,000 MNIST digits; inference with running statistics."
        f" Line: mean of {seeds} seed{'s' * (seeds > 1)}; band: lowest to highest.",
        ha="center",
        color=FAINT,
        fontsize=9.5,
    )
    figure.savefig(path, dpi=110)


def _examples(axis: Any, setting: Setting) -> None:
    """A minibatch as the layer sees it."""
    data = load()
    generator = torch.Generator().manual_seed(1)
    index = draw_batch(setting, classes_of(data.labels), generator)[: setting.group]
    rows = max(1, setting.group // 8)
    images = data.images[index, 0].reshape(rows, -1, 28, 28)
    picture = images.transpose(1, 2).reshape(rows * 28, -1).numpy()
    height, width = picture.shape
    axis.imshow(picture, cmap="gray_r", extent=(0, width, 0, height))
    axis.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor="#BBBBBB"))
    axis.set_aspect("equal", adjustable="datalim")  # the panels' titles stay on one line
    axis.set_axis_off()
    axis.set_title(f"normalised together:\n{setting.title}", fontsize=12, fontweight="bold", color=INK)


def _curves(axis: Any, curves: dict[Run, list[float]], setting: Setting, steps: int) -> None:
    x = evaluation_steps(steps)
    final = {}
    for method, colour in COLOURS.items():
        accuracies = by_method(curves, setting, method).numpy()
        mean = accuracies.mean(0)
        axis.fill_between(x, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.18, linewidth=0)
        axis.plot(x, mean, color=colour, linewidth=2)
        final[method] = mean[-1].item()
    axis.axhline(10, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(steps, 8.6, "guessing", color=FAINT, fontsize=9, ha="right", va="top")
    axis.set(xlim=(0, steps), ylim=(0, 102), yticks=range(0, 101, 20))
    axis.tick_params(colors=INK)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _end_labels(axis, final, steps)


def _end_labels(axis: Any, final: dict[str, float], steps: int) -> None:
    """Each curve's name and last value to the right of the panel, kept from overlapping."""
    y = 110.0
    for method in sorted(final, key=lambda m: -final[m]):
        y = min(final[method] + 2, y - 13)
        text = f"{METHODS[method]}\n{final[method]:.1f} %"
        colour = COLOURS[method]
        axis.text(steps * 1.03, y, text, color=colour, fontsize=10, fontweight="bold", va="center")
