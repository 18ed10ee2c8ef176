"""The command line: ``python -m triton_brn info | demo | tune``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from .backend import obstacle, uses_triton
from .version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m triton_brn", description="Batch Renormalization for PyTorch"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which code serves which device")
    demo = commands.add_parser("demo", help="BatchNorm against Batch Renormalization on 5,000 MNIST digits")
    demo.add_argument("--quick", action="store_true", help="a quarter of the steps")
    demo.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    demo.add_argument("--out", default=".", help="folder or file of the figure (default: this folder)")
    demo.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    _add_tune(commands)
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return
    if args.command == "tune":
        from ._tune_report import run_tune

        run_tune(args.shape, args.dtype, args.channels_last, args.device, args.budget)
        return
    if args.seeds < 1:
        parser.error(f"argument --seeds: expected at least 1, got {args.seeds}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        parser.error(f"argument --device: {error}")
    from .demo import run_demo

    run_demo(quick=args.quick, device=args.device, out=args.out, seeds=args.seeds)


def _add_tune(commands: Any) -> None:
    from ._tune_report import DTYPES, shape_of

    tune = commands.add_parser("tune", help="find this device's fastest launch plans and store them")
    tune.add_argument(
        "--shape",
        type=shape_of,
        action="append",
        metavar="N,C,...",
        help="an input, as often as you like (default: the layers of ResNet-50 at batch 32)",
    )
    tune.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the inputs (default: bf16)")
    tune.add_argument("--channels-last", action="store_true", help="inputs of that memory format")
    tune.add_argument("--device", help="where to tune (default: the accelerator)")
    tune.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="end after so long (default: never)"
    )


def info() -> str:
    """Versions, and for each device the code that serves it and why."""
    lines = [
        f"triton_brn {__version__}",
        f"torch      {torch.__version__}",
        f"triton     {_triton_version()}",
        f"TRITON_BRN_BACKEND  {os.environ.get('TRITON_BRN_BACKEND', 'auto (not set)')}",
    ]
    lines += [f"{name:20}{_served_by(device)}" for name, device in _devices()]
    return "\n".join(lines)


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported ({error})"
    interpreter = " (interpreter on)" if triton.knobs.runtime.interpret else ""
    return f"{triton.__version__}{interpreter}"


def _devices() -> list[tuple[str, torch.device]]:
    devices = [("cpu", torch.device("cpu"))]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            devices.append((f"{accelerator.type}:{index}", torch.device(accelerator.type, index)))
    return devices


def _served_by(device: torch.device) -> str:
    try:
        if uses_triton(device):
            return "Triton kernels"
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    why = (
        obstacle(device.type)
        if os.environ.get("TRITON_BRN_BACKEND") != "eager"
        else "TRITON_BRN_BACKEND=eager"
    )
    return f"plain PyTorch: {why}"


if __name__ == "__main__":
    main()
