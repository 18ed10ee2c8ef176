"""What Triton's driver says of a device. Asked at the first call, never at import."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .plans import Device

#: CUDA's handle, and HIP's, of the default stream that every thread has of its own.
PER_THREAD = 2
INTERPRETED = triton.knobs.runtime.interpret

#: Bytes of L2 by compute capability, the least of the chips that have it; Triton's drivers do not tell.
L2_BYTES = {
    80: 40 << 20,
    86: 4 << 20,
    89: 32 << 20,
    90: 50 << 20,
    100: 126 << 20,
    103: 126 << 20,
    120: 32 << 20,
}


def device_of(x: Tensor) -> Device:
    """What the planner knows of x's device."""
    return device_at(x.device.index or 0)


@functools.cache
def device_at(index: int) -> Device:
    """What the planner knows of the device of this index."""
    if INTERPRETED:
        return Device("interpreter", sms=2, waits=False)  # programs run one after another: few are quicker
    active = triton.runtime.driver.active
    properties = active.utils.get_device_properties(index)
    target = active.get_current_target()
    major, minor = triton.__version__.split(".")[:2]
    nvidia = target.backend == "cuda"
    return Device(
        f"{target.backend}:{target.arch}",
        sms=properties["multiprocessor_count"],
        capability=target.arch if nvidia else 0,
        triton=(int(major), int(minor)),
        registers=properties["max_num_regs"],
        shared=properties["max_shared_mem"],
        warp=target.warp_size,
        l2=L2_BYTES.get(target.arch, 0),
    )


def table_name(x: Tensor) -> str:
    """The name that tuning tables know x's device by: its model's, where torch tells it."""
    return _table_name(x.device.type, x.device.index or 0)


@functools.cache
def _table_name(kind: str, index: int) -> str:
    name = "" if kind == "cpu" else torch.get_device_module(kind).get_device_name(index)
    return name or device_at(index).name


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: it owns what is made meanwhile, and holds what is launched."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def current_stream(index: int) -> int:
    """The handle of the device's current stream."""
    return triton.runtime.driver.active.get_current_stream(index)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's."""
    if x.device.type == "cpu" or torch.accelerator.current_device_index() == x.device.index:
        return nullcontext()
    return torch.accelerator.device_index(x.device.index)
