"""The command line: ``python -m triton_brn info | demo | tune | bench``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import benchmark
from .info import info
from .validate import NAMED_DTYPES
from .version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m triton_brn", description="Batch Renormalization for PyTorch"
    )
    parser.add_argument("--version", action="version", version=f"triton_brn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, devices, and the launch plan for a shape")
    about.add_argument("--shape", type=benchmark.shape_of, help="N,C or N,C,...: how such an input is run")
    about.add_argument("--dtype", choices=NAMED_DTYPES, default="fp32", help="of the input (default: fp32)")
    about.add_argument("--channels-last", action="store_true", help="the input's memory format")
    demo = commands.add_parser("demo", help="BatchNorm against Batch Renormalization on 5,000 MNIST digits")
    demo.add_argument("--quick", action="store_true", help="a quarter of the steps")
    demo.add_argument("--device", help="where to train (default: the GPU if there is one, else cpu)")
    demo.add_argument(
        "--out", default="triton_brn_demo", help="folder or file of the figure (default: %(default)s)"
    )
    demo.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    _add_tune(commands)
    benchmark.add_command(commands)
    args = parser.parse_args(argv)
    if args.command == "bench":
        return benchmark.command(args, parser.error)
    if args.command == "info":
        print(info(args.shape, args.dtype, args.channels_last))
        return
    if args.command == "tune":
        from ._tune_report import run_tune

        run_tune(args.shape, args.dtype, args.channels_last, args.device, args.budget)
        return
    if args.seeds < 1:
        parser.error(f"argument --seeds: expected at least 1, got {args.seeds}")
    try:
        torch.empty(1, device=args.device or "cpu")
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        parser.error(f"argument --device: {error}")
    from .demo import run_demo

    run_demo(quick=args.quick, device=args.device, out=args.out, seeds=args.seeds)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="find this device's fastest launch plans and store them")
    tune.add_argument(
        "--shape",
        type=benchmark.shape_of,
        action="append",
        metavar="N,C,...",
        help="an input, as often as you like (default: the layers of ResNet-50 at batch 32)",
    )
    tune.add_argument("--dtype", choices=NAMED_DTYPES, default="bf16", help="of the inputs (default: bf16)")
    tune.add_argument("--channels-last", action="store_true", help="inputs of that memory format")
    tune.add_argument("--device", help="where to tune (default: the accelerator)")
    tune.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="end after so long (default: never)"
    )


if __name__ == "__main__":
    main()
