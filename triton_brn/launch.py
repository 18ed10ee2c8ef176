"""The launch room: from tensors to kernel launches. Only this module calls device code."""

from __future__ import annotations

import functools
import logging
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .kernels.backward import backward_kernel
from .kernels.forward import forward_kernel
from .kernels.inference import inference_kernel
from .planner import Device, Plan, View, plan, view_of

_log = logging.getLogger(__name__)
INTERPRETED = triton.knobs.runtime.interpret


def forward(x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std):  # type: ignore[no-untyped-def]
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and saved (5, C)."""
    x, view = dense(x, "input")
    how = plan("forward", view, x.element_size(), device_of(x))
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, view.channels))
    one_launch = how.strategy == "resident"
    partials = None if one_launch else running_mean.new_empty((how.splits, 4, view.channels))
    running, workspace = (running_mean, running_var, step), (partials, tickets(x, how.groups))
    settings = numbers((momentum, eps, tuple(r_max), tuple(d_max)))
    arguments = (x, y, (weight, bias), running, saved, workspace, *view, settings)
    for statistics, apply in ((True, True),) if one_launch else ((True, False), (False, True)):
        phases = {"STATISTICS": statistics, "APPLY": apply, "AVERAGE_STD": average_std}
        launch(forward_kernel, how, x, *arguments, **phases)
    torch.autograd.graph.increment_version([t for t in running if t is not None])  # autograd saw nothing
    return y, saved


def inference(x, weight, bias, running_mean, running_var, eps, save):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (5, C)."""
    x, view = dense(x, "input")
    how = plan("inference", view, x.element_size(), device_of(x))
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, view.channels) if save else 0)
    statistics = (running_mean, running_var)
    launch(inference_kernel, how, x, x, y, (weight, bias), statistics, saved, *view, numbers(eps), SAVE=save)
    return y, saved


def backward(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    """Gradients with respect to x, weight and bias; empty tensors where ``needs`` says False."""
    x, view = dense(x, "input")
    dy = laid_out_as(x, dy)
    how = plan("backward", view, x.element_size(), device_of(x))
    like = saved if weight is None else weight
    dx = torch.empty_like(x) if needs[0] else None
    wanted = needs[1] or needs[2]
    grads = (like.new_empty(view.channels), like.new_empty(view.channels)) if wanted else (None, None)
    sums = training or wanted
    one_launch = how.strategy == "resident" or not training or dx is None
    partials = saved.new_empty((how.splits + 1, 2, view.channels)) if sums else None
    arguments = (x, dy, dx, (weight, None), saved, grads, (partials, tickets(x, how.groups)), *view)
    for phases in ((sums, dx is not None),) if one_launch else ((True, False), (False, True)):
        launch(backward_kernel, how, x, *arguments, TRAINING=training, SUMS=phases[0], APPLY=phases[1])
    return x.new_empty(0) if dx is None else dx, *(like.new_empty(0) if g is None else g for g in grads)


def launch(kernel: Any, how: Plan, x: Tensor, *arguments: Any, **phases: bool) -> None:
    """Launch a kernel over the plan's grid, on x's device."""
    with on_device(x):
        kernel[(how.groups, how.splits)](
            *arguments, **phases, **how.tile, num_warps=how.num_warps, enable_fp_fusion=True
        )


def dense(x: Tensor, name: str) -> tuple[Tensor, View]:
    """x, or a dense copy of it, and its view."""
    view = view_of(x.shape, x.stride())
    if view is None:
        _log.debug("%s of shape %s, strides %s is not dense: copied", name, tuple(x.shape), x.stride())
        x = x.clone(memory_format=torch.preserve_format)
        view = view_of(x.shape, x.stride())
        assert view is not None
    return x, view


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """dy, or a copy of it, with the strides of x."""
    same = all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), dy.stride(), strict=True))
    if same and dy.dtype == x.dtype:
        return dy
    _log.debug("gradient of strides %s, %s: copied to the input's %s", dy.stride(), dy.dtype, x.stride())
    return torch.empty_like(x).copy_(dy)


@functools.lru_cache(maxsize=1024)
def numbers(values: Any) -> Any:
    """Numbers, in nested tuples, as the kernels take them: (nearest float32, remainder)."""
    if isinstance(values, tuple):
        return tuple(numbers(v) for v in values)
    if abs(values) > 3.4e38:
        return (values * float("inf"), 0.0)
    nearest = struct.unpack("f", struct.pack("f", values))[0]
    return (nearest, values - nearest)


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def tickets(x: Tensor, count: int) -> Tensor:
    """``count`` int32 zeros, which the kernels leave at zero; one buffer per device and stream."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # A buffer made during capture is zeroed by the graph's replay, not now: not for the cache.
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    stream = 0 if INTERPRETED else triton.runtime.driver.active.get_current_stream(x.device.index or 0)
    key = (x.device, stream)
    buffer = _tickets.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = _tickets[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=x.device)
    return buffer


def device_of(x: Tensor) -> Device:
    """What the planner knows of x's device."""
    return _device(x.device.index or 0)


@functools.cache
def _device(index: int) -> Device:
    if INTERPRETED:
        return Device("interpreter", sms=2)  # programs run one after another: few are quicker
    active = triton.runtime.driver.active
    properties = active.utils.get_device_properties(index)
    target = active.get_current_target()
    return Device(f"{target.backend}:{target.arch}", sms=properties["multiprocessor_count"])


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's."""
    if x.device.type == "cpu" or torch.accelerator.current_device_index() == x.device.index:
        return nullcontext()
    return torch.accelerator.device_index(x.device.index)
