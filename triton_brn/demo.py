"""The demo: BatchNorm against Batch Renormalization on 5,000 MNIST digits, in three settings of the paper."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import progress
from ._demo_train import METHODS, SETTINGS, Run, Setting, evaluation_steps, train
from .backend import uses_triton

EXTRAS = ("matplotlib", "mlxtend", "tqdm")
STEPS, QUICK_STEPS = 1_000, 250
MOST_PROCESSES = 8  # each takes about 400 MB


_steps_done: Any = None  # in a worker process: the counter that all of them share


def _start_worker(counter: Any) -> None:
    global _steps_done
    _steps_done = counter
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


def _count_step() -> None:
    with _steps_done.get_lock():
        _steps_done.value += 1


def _work(run: Run) -> tuple[Run, list[float]]:
    return run, train(run, _count_step)


@contextmanager
def _finished(runs: Sequence[Run], processes: int, bar: Any) -> Iterator[Iterator[tuple[Run, list[float]]]]:
    """The runs with their curves as they finish, while ``bar`` counts steps.

    On the CPU each run has one thread of a process to itself: its tensors are too small to share
    between cores, and its result then does not depend on their number.
    """
    if runs[0].device != "cpu":
        yield ((run, train(run, bar.update)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)

    def wait(results: Any) -> Iterator[tuple[Run, list[float]]]:
        while True:
            try:
                yield results.next(timeout=0.2)
            except multiprocessing.TimeoutError:
                bar.update(counter.value - bar.n)
            except StopIteration:
                bar.update(counter.value - bar.n)
                return

    with context.Pool(processes, _start_worker, (counter,)) as pool:
        yield wait(pool.imap_unordered(_work, runs))


def train_all(runs: Sequence[Run], processes: int) -> dict[Run, list[float]]:
    """Train all runs behind one progress bar, naming each as it ends."""
    curves = {}
    with (
        progress.bar(sum(run.steps for run in runs), "step") as bar,
        _finished(runs, processes, bar) as finished,
    ):
        for run, curve in finished:
            curves[run] = curve
            name = f"{run.setting.title:22}{METHODS[run.method]:14}seed {run.seed}"
            bar.write(f"{name}  {curve[-1]:5.1f} %")
    return curves


def by_method(curves: dict[Run, list[float]], setting: Setting, method: str) -> Tensor:
    """Accuracies (seeds, evaluations)."""
    chosen = sorted((r for r in curves if (r.setting, r.method) == (setting, method)), key=lambda r: r.seed)
    return torch.tensor([curves[run] for run in chosen], dtype=torch.float64)


def table(curves: dict[Run, list[float]]) -> str:
    """The final accuracies beside the paper's."""
    steps, seeds = next(iter(curves)).steps, len({run.seed for run in curves})
    lines = [
        f"Accuracy in % on 1,000 held-out digits after {steps:,} steps:"
        f" mean (lowest to highest) of {seeds} seed{'s' * (seeds > 1)}",
        "",
        _row("normalised together", *METHODS.values(), "gain"),
    ]
    for setting in SETTINGS:
        final = {method: by_method(curves, setting, method)[:, -1] for method in METHODS}
        cells = (f"{a.mean():.1f} ({a.min():.1f} to {a.max():.1f})" for a in final.values())
        gain = final["BRN"].mean() - final["BN"].mean()
        lines.append(_row(setting.title, *cells, f"{gain:+.1f}"))
    lines += ["", "The paper: Inception-v3 on ImageNet (Ioffe 2017, section 4)", ""]
    for setting in SETTINGS:
        bn, brn = setting.paper
        lines.append(_row(setting.paper_setting, f"{bn:.1f}", f"{brn:.1f}", f"{brn - bn:+.1f}"))
    lines.append("(4 random images: BatchNorm after 210,000 steps, Batch Renorm after 130,000)")
    return "\n".join(lines)


def _row(setting: str, *cells: str) -> str:
    *accuracies, gain = cells
    return f"{setting:34}{''.join(f'{cell:22}' for cell in accuracies)}{gain:>6}"


def seconds_of(runs: Sequence[Run], processes: int) -> float:
    """About how long the runs take, by a few steps of each kind, in one thread, and an evaluation."""
    threads = torch.get_num_threads()
    if runs[0].device == "cpu":
        torch.set_num_threads(1)
    per_run = {}
    for setting, method in dict.fromkeys((run.setting, run.method) for run in runs):
        times = [time.perf_counter()]
        run = Run(setting, method, 0, steps=12, device=runs[0].device)
        train(run, lambda times=times: times.append(time.perf_counter()))  # type: ignore[misc]
        *steps, last = (after - before for before, after in pairwise(times))
        step = median(steps)
        per_run[setting, method] = runs[0].steps * step + len(evaluation_steps(runs[0].steps)) * max(
            last - step, 0.0
        )
    torch.set_num_threads(threads)
    start = 4.0 if runs[0].device == "cpu" else 0.0  # of the processes: each imports torch
    return start + sum(per_run[run.setting, run.method] for run in runs) / processes


def run_demo(
    *, quick: bool = False, device: str | None = None, out: str | Path = "triton_brn_demo", seeds: int = 3
) -> None:
    """Train, draw the figure to ``out`` (a folder or a file) and print the table.

    Args:
        quick: a quarter of the steps.
        device: where to train; None: the GPU if there is one, else the CPU.
        out: the figure's folder, made where there is none, or its file.
        seeds: runs of each kind.

    Raises:
        SystemExit: packages of the extra ``demo`` are missing, or the run was interrupted.
    """
    progress.require("demo", EXTRAS)
    from ._demo_plot import check_format, draw

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    figure = Path(out)
    if not figure.suffix:
        figure = figure / "demo.png"
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
        check_format(figure)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: argument --out: {error}") from None
    steps = QUICK_STEPS if quick else STEPS
    # The longest runs first, so that the processes end together.
    order = [(setting, method) for method in reversed(METHODS) for setting in reversed(SETTINGS)]
    runs = [Run(setting, method, seed, steps, device) for setting, method in order for seed in range(seeds)]
    processes = min(torch.get_num_threads(), MOST_PROCESSES, len(runs)) if device == "cpu" else 1
    where = f"{processes} process{'es' * (processes > 1)}" if device == "cpu" else "one after the other"
    code = "the Triton kernels" if uses_triton(torch.device(device)) else "plain PyTorch"
    start = time.perf_counter()
    print(f"{len(runs)} runs of {steps} steps on {device}, {where}; Batch Renorm by {code}", flush=True)
    try:
        print(f"This takes about {progress.minutes(seconds_of(runs, processes))}", flush=True)
        curves = train_all(runs, processes)
    except KeyboardInterrupt:
        raise SystemExit("demo: interrupted, nothing was drawn") from None
    print(f"\n{table(curves)}\n")
    draw(curves, figure)
    print(f"Figure: {figure}   ({time.perf_counter() - start:.0f} s)")
