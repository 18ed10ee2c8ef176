"""``python -m triton_brn tune``: tune, and say what each shape gained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._bench_cases import RESNET50
from .tuning import Tuned, served_device, tune
from .validate import NAMED_DTYPES

#: What is tuned unless shapes are given: the layers of ResNet-50 at batch 32.
SHAPES = tuple((32, channels, size, size) for channels, size in RESNET50)


def run_tune(
    shapes: Sequence[tuple[int, ...]] | None,
    dtype: str,
    channels_last: bool,
    device: str | None,
    budget: float,
) -> None:
    """Tune the shapes, with a progress bar, and print the results and where they are."""
    shapes = shapes or SHAPES
    try:
        where = served_device() if device is None else torch.device(device)
        results = tune(
            shapes,
            dtype=NAMED_DTYPES[dtype],
            channels_last=channels_last,
            device=where,
            budget=budget,
            progress=True,
        )
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        # An assertion is what torch says of a device that it was not built for.
        raise SystemExit(f"tune: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("tune: interrupted; what was finished is stored, and the next run goes on") from None
    print(report(results))
    left = len(dict.fromkeys(shapes)) * 3 - len(results)
    if left:
        print(f"{left} left: the budget is spent, the next run goes on")
    from .devices import table_name
    from .tuning_table import directory, path_of

    print(f"Table: {path_of(table_name(torch.empty(0, device=where)), directory())}")


def report(results: Sequence[Tuned]) -> str:
    """A line for each result."""
    row = "{:11}{:>20}  {:10}{:14}{:>12}{:>12}{:>8}  {:12}{}".format
    lines = [row("direction", "shape", "dtype", "layout", "default us", "tuned us", "gain", "strategy", "")]
    for result in results:
        gain = f"{result.default_us / result.us - 1:+.1%}"
        note = "" if result.news else "in the table already"
        note = note if result.finished else "not finished"
        shape = "x".join(map(str, result.shape))
        times = (f"{result.default_us:.1f}", f"{result.us:.1f}")
        lines.append(
            row(
                result.direction, shape, result.dtype, result.layout, *times, gain, result.strategy, note
            ).rstrip()
        )
    return "\n".join(lines)
