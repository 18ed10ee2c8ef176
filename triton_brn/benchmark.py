"""``python -m triton_brn bench``: BatchRenorm against everything a user would pick instead."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import progress
from ._bench_cases import DIRECTIONS, ON_IMAGES, PRESETS, Case, Shape, default_cases, preset_shapes
from .validate import NAMED_DTYPES

EXTRAS = ("matplotlib", "rich", "tqdm")  # those of peers are not needed
MODELS = ("resnet18", "resnet50")
#: Of a run of the default inputs, so that it is over in less than 3 minutes.
SECONDS = 150.0
COMPILE_SECONDS = 45.0


def shape_of(text: str) -> Shape:
    """ "32,64,56,56" as a tuple.

    Raises:
        argparse.ArgumentTypeError: it is no list of 2 to 5 sizes above 0.
    """
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected 2 to 5 sizes above 0 as in 32,64,56,56, got {text!r}")
    return shape


def add_command(commands: Any) -> None:
    """Add ``bench`` to the command line's sub-commands."""
    bench = commands.add_parser("bench", help="times against torch.nn.BatchNorm and other batch renorms")
    add = bench.add_argument
    add("--shape", type=shape_of, nargs="+", action="extend", metavar="N,C,...", help="inputs to measure")
    add("--preset", choices=PRESETS, help="inputs of a network (default: a few of each kind)")
    add(
        "--batch", type=int, nargs="+", help="of the presets resnet50, inception, odd (CPU: 4; else 4 32 256)"
    )
    add(
        "--model",
        choices=MODELS,
        help="a training step of a whole network instead, images 64x64, on a GPU 224x224",
    )
    add("--dtype", choices=list(NAMED_DTYPES), nargs="+", help="(default: fp32 on the CPU, else bf16)")
    add("--channels-last", action="store_true", help="maps in channels_last")
    add("--direction", choices=DIRECTIONS, nargs="+", help="(default: all; --quick: forward, both)")
    add("--quick", action="store_true", help="two inputs, short, nothing compiled")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="for the whole run, about (default: 150; no limit for --shape and --preset)",
    )
    add(
        "--compile-seconds",
        type=float,
        metavar="S",
        help="of these for torch.compile at most (default: 45, at most 0.3 of --seconds; --quick: 0)",
    )
    add("--device", help="(default: the GPU if there is one, else cpu)")
    add(
        "--out",
        type=Path,
        default=Path("triton_brn_bench"),
        help="folder of tables and figures (default: %(default)s)",
    )


def command(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Check the parsed arguments and run. ``error`` ends the program with its message."""
    progress.require("bench", EXTRAS)
    device = _device(args.device, error)
    if args.batch is not None and min(args.batch) < 1:
        error(f"argument --batch: expected at least 1, got {min(args.batch)}")
    if args.batch and not (args.model or args.preset in ON_IMAGES):
        error(f"argument --batch: goes with --model or --preset {', '.join(ON_IMAGES)}")
    if args.shape and args.preset:
        error("argument --preset: not allowed with argument --shape")
    for name in ("seconds", "compile_seconds"):
        given = getattr(args, name)
        if given is not None and not given >= 0:
            error(f"argument --{name.replace('_', '-')}: expected at least 0, got {given:g}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        error(f"argument --out: {wrong}")
    if args.model:
        for name in ("shape", "preset", "dtype", "direction", "seconds", "compile_seconds"):
            if getattr(args, name) is not None:
                error(f"argument --{name.replace('_', '-')}: not allowed with argument --model")
        from ._bench_models import run_model

        with _current(device):
            run_model(
                args.model,
                device,
                args.batch,
                quick=args.quick,
                channels_last=args.channels_last,
                out=args.out,
            )
        return
    seconds, compile_seconds = seconds_of(args)
    if seconds is not None and compile_seconds > seconds:
        error(f"argument --compile-seconds: expected at most --seconds {seconds:g}, got {compile_seconds:g}")
    directions = args.direction or (("forward", "both") if args.quick else DIRECTIONS)
    run_bench(
        cases_of(args, device, error),
        directions=directions,
        device=device,
        out=args.out,
        quick=args.quick,
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def seconds_of(args: argparse.Namespace) -> tuple[float | None, float]:
    """For the whole run, None without a limit, and of these for torch.compile."""
    seconds = args.seconds
    if seconds is None and not args.shape and args.preset in (None, "default"):
        seconds = SECONDS
    if args.compile_seconds is not None:
        return seconds, args.compile_seconds
    if args.quick:
        return seconds, 0.0
    return seconds, COMPILE_SECONDS if seconds is None else min(COMPILE_SECONDS, 0.3 * seconds)


def _device(name: str | None, error: Callable[[str], Any]) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as wrong:  # a build without CUDA asserts
        error(f"argument --device: {wrong}")
        raise
    if device.type not in ("cpu", "cuda"):
        error(f"argument --device: expected cpu or cuda, got {name}")
    return device


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Streams, events and memory are those of the current device: make it the one that is measured."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cases_of(args: argparse.Namespace, device: torch.device, error: Callable[[str], Any]) -> list[Case]:
    """The inputs that the arguments ask for."""
    on_gpu = device.type == "cuda"
    dtypes = args.dtype or ["bf16" if on_gpu else "fp32"]
    shapes = args.shape
    if args.preset not in (None, "default"):
        batches = tuple(args.batch or ((4, 32, 256) if on_gpu else (4,)))
        shapes = preset_shapes(args.preset, batches)
    cases = []
    for dtype in dtypes:
        found = [Case(s, dtype) for s in shapes] if shapes else default_cases(dtype, on_gpu, args.quick)
        if args.channels_last:
            found = list(
                dict.fromkeys(Case(c.shape, dtype, "channels_last") for c in found if len(c.shape) > 3)
            )
            if not found:
                error("argument --channels-last: expected shapes of 4 or 5 sizes")
        cases += found
    return list(dict.fromkeys(cases))


def run_bench(
    cases: Sequence[Case],
    *,
    directions: Sequence[str] = DIRECTIONS,
    device: torch.device | str = "cpu",
    out: str | Path = "triton_brn_bench",
    quick: bool = False,
    seconds: float | None = None,
    compile_seconds: float = COMPILE_SECONDS,
) -> list[Any]:
    """Measure, print a table and write layers.csv, layers.json and three figures to the folder ``out``.

    Args:
        cases: the inputs.
        directions: of "forward", "backward", "both" (forward and backward) and "inference".
        device: a CPU or CUDA device.
        out: a folder, made where there is none.
        quick: fewer rounds.
        seconds: for all measurements, about: each takes a few rounds at least. None: no limit.
        compile_seconds: of these for torch.compile; what is left then is not compiled, and rows say so.

    Returns:
        The rows, one for each contestant, direction and input; see ``_bench_run.Row``.
    """
    from . import _bench_plot as plot
    from ._bench_budget import Budget
    from ._bench_measure import QUICK, Effort, copy_bandwidth
    from ._bench_report import print_tables, write
    from ._bench_run import measure

    device = torch.empty(1, device=device).device  # with its index
    out = Path(out)
    start = time.perf_counter()
    count = len(cases) * len(directions)
    budget = Budget(QUICK if quick else Effort(), count, seconds, compile_seconds)
    rows: list[Any] = []
    about = progress.minutes(budget.estimate(timers=3 if device.type == "cuda" else 1))
    print(f"{len(cases)} inputs, {len(directions)} directions on {device}: about {about}", file=sys.stderr)
    paths: list[Path] = []
    with _current(device), progress.bar(count, "direction") as bar:
        bar.set_postfix_str("copy bandwidth")
        copy_bandwidth(device)
        try:
            for case in cases:
                for found in measure(case, directions, device, budget, bar):
                    rows += found
                    paths = write(rows, out, "layers")  # after each direction: a run may be ended
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        except KeyboardInterrupt:
            if not rows:
                raise SystemExit("bench: interrupted, nothing was measured") from None
            bar.write("Interrupted: what was measured follows.")
    print_tables(rows)
    paths += plot.draw(rows, out)
    print(
        f"Written to {out}: {', '.join(path.name for path in paths)}   ({time.perf_counter() - start:.0f} s)"
    )
    return rows
