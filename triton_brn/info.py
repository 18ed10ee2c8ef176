"""What ``python -m triton_brn info`` says: versions, devices, and how an input would be run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from . import planner
from .backend import obstacle, uses_triton
from .limits import lacks
from .plans import STRATEGIES, Device, Plan
from .validate import NAMED_DTYPES
from .version import __version__
from .views import View

#: Planned for where there is no GPU to plan for.
EXAMPLE = Device("an NVIDIA H100, for example", 132, 90, (3, 9), l2=50 << 20)


def info(shape: tuple[int, ...] | None = None, dtype: str = "fp32", channels_last: bool = False) -> str:
    """Versions; for each device the code that serves it and why; for a shape, the plans."""
    lines = [
        f"triton_brn {__version__}",
        f"torch      {torch.__version__}",
        f"triton     {_triton_version()}",
        f"TRITON_BRN_BACKEND  {os.environ.get('TRITON_BRN_BACKEND', 'auto (not set)')}",
    ]
    gpus: list[tuple[Device, torch.device | None]] = []
    for name, device in _devices():
        lines.append(f"{name:20}{_served_by(device)}")
        if lines[-1].endswith("Triton kernels"):
            from .devices import device_at

            gpus.append((device_at(device.index or 0), device))
            lines += [f"{'':20}{line}" for line in _properties(gpus[-1][0])]
    if shape is not None:
        view = view_of_shape(shape, channels_last)
        layout = "channels_last" if channels_last else "contiguous"
        for gpu, where in gpus or [(EXAMPLE, None)]:
            lines += ["", f"{shape}, {dtype}, {layout} on {gpu.name}:"]
            lines += _plans(view, NAMED_DTYPES[dtype], gpu, where)
    return "\n".join(lines)


def view_of_shape(shape: tuple[int, ...], channels_last: bool) -> View:
    """The kernels' view of a dense input."""
    outer, inner = shape[0], 1
    for size in shape[2:]:
        outer, inner = (outer * size, inner) if channels_last else (outer, inner * size)
    return View(outer, shape[1], inner)


def _properties(gpu: Device) -> Iterator[str]:
    yield f"{gpu.name}, {gpu.sms} multiprocessors of {gpu.registers:,} registers, warps of {gpu.warp}"
    yield f"L2: {gpu.l2 >> 20} MiB" if gpu.l2 else "L2: size not known"
    for strategy in STRATEGIES:
        yield f"{strategy:14}{lacks(strategy, gpu) or 'yes'}"


def _plans(view: View, dtype: torch.dtype, gpu: Device, where: torch.device | None) -> Iterator[str]:
    itemsize = dtype.itemsize
    for direction in ("forward", "backward", "inference"):
        plan = planner.plan(direction, view, itemsize, gpu)
        tuned = None if where is None else _tuned(direction, view, dtype, gpu, where)
        yield f"  {direction:11}{'tuned, ' if tuned else ''}{_described(tuned or plan, direction)}"
        for strategy in STRATEGIES if direction != "inference" else ():
            if tuned or strategy != plan.strategy:
                try:
                    other = _described(planner.plan(direction, view, itemsize, gpu, strategy), direction)
                except ValueError as error:
                    other = f"{strategy}: no, {str(error).split(': ')[-1]}"
                yield f"    or       {other}"


def _tuned(direction: str, view: View, dtype: torch.dtype, gpu: Device, where: torch.device) -> Plan | None:
    """The plan that the device's table has."""
    from . import tuned, tuning_table

    x = torch.empty(0, dtype=dtype, device=where)
    entry = tuning_table.look_up(*tuned.place(direction, view, x))
    return tuned.chosen(entry, direction, view, x, gpu)


def _described(plan: Plan, direction: str) -> str:
    tile = plan.tile
    strategy, launches = plan.strategy, "2 launches" if plan.strategy == "two_launch" else "1 launch"
    if direction == "inference":  # no statistics: the second of the two alone
        strategy, launches = "apply", "1 launch"
    cluster = f" x {plan.num_ctas}" if plan.num_ctas > 1 else ""
    return (
        f"{strategy}: {launches}, grid {plan.slots} x {plan.splits}{cluster}, {plan.num_warps} warps, "
        f"tile {tile.block} x {tile.width} ({tile.shape}), {plan.groups} channel groups"
    )


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
