"""The launch room: from tensors to kernel launches. Only this module calls device code."""

from __future__ import annotations

import functools
import logging
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import planner
from .devices import INTERPRETED, capturing, current_stream, device_of
from .kernels.backward import batch_renorm_backward_kernel
from .kernels.forward import batch_renorm_forward_kernel
from .kernels.inference import batch_renorm_inference_kernel
from .plans import Plan
from .tuned import tuned_plan
from .views import View, view_of

_log = logging.getLogger(__name__)


def forward(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std, call=None
):
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and saved (5, C)."""
    x, call = prepared("forward", x, running_mean.dtype, call)
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, call.view.channels))
    running = (running_mean, running_var, step)
    settings = numbers((momentum, eps, tuple(r_max), tuple(d_max)))
    arguments = (x, y, (weight, bias), running, saved, call.workspace(saved), *call.view, settings)
    inputs = (x, weight, bias, *running)
    for statistics, apply in call.phases():
        flags = (statistics, apply, call.plan.kept, call.plan.split, average_std)
        if not call.launch(batch_renorm_forward_kernel, arguments, flags, inputs):
            args = (momentum, eps, r_max, d_max, average_std)
            return forward(x, weight, bias, *running, *args, call)
    torch.autograd.graph.increment_version([t for t in running if t is not None])  # autograd saw nothing
    return y, saved


def kept_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``forward``, and what ``again`` takes."""
    y, saved = forward(*args)
    return y, saved, saved


def again(x, weight, bias, saved, call=None):  # type: ignore[no-untyped-def]
    """y of a forward that saved these numbers, and them."""
    x, call = prepared("inference", x, saved.dtype, call)
    y = torch.empty_like(x)
    arguments = (x, y, (weight, bias), (None, None), saved, *call.view, numbers(0.0))
    call.launch(batch_renorm_inference_kernel, arguments, (False,), (x, weight, bias, saved))
    return y, saved


def inference(x, weight, bias, running_mean, running_var, eps, save, call=None):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (5, C)."""
    x, call = prepared("inference", x, running_mean.dtype, call)
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, call.view.channels) if save else 0)
    running = (running_mean, running_var)
    arguments = (x, y, (weight, bias), running, saved, *call.view, numbers(eps))
    call.launch(batch_renorm_inference_kernel, arguments, (save,), (x, weight, bias, *running))
    return y, saved


def backward(dy, x, weight, saved, training, needs, call=None):  # type: ignore[no-untyped-def]
    """Gradients with respect to x, weight and bias; empty tensors where ``needs`` says False."""
    x, call = prepared("backward" if training else "inference", x, saved.dtype, call)
    dy = laid_out_as(x, dy)
    like = saved if weight is None else weight
    channels = call.view.channels
    dx = torch.empty_like(x) if needs[0] else None
    wanted = needs[1] or needs[2]
    grads = (like.new_empty(channels), like.new_empty(channels)) if wanted else (None, None)
    arguments = (x, dy, dx, weight, saved, grads, call.workspace(saved), *call.view)
    if dx is None:
        phases: tuple[tuple[bool, bool], ...] = ((True, False),)
    else:
        phases = call.phases() if training else ((wanted, True),)
    for sums, apply in phases:
        flags = (training, sums, apply, call.plan.kept, call.plan.split)
        inputs = (x, dy, dx, weight, saved, *grads)
        if not call.launch(batch_renorm_backward_kernel, arguments, flags, inputs):
            return backward(dy, x, weight, saved, training, needs, call)
    return x.new_empty(0) if dx is None else dx, *(like.new_empty(0) if g is None else g for g in grads)


class DoesNotFit(ValueError):
    """The plan that was asked for has more programs that wait than run at the same time."""


#: Numbers per channel that a split hands in, and that are published, see the kernels.
EXCHANGED = {"forward": (3, 2), "backward": (2, 3)}


class Call:
    """All that calls of one kind share: view, plan, workspace, compiled kernels. Tuning gives a plan."""

    def __init__(
        self, direction: str, view: View, x: Tensor, statistics: torch.dtype, plan: Plan | None = None
    ) -> None:
        self.direction, self.view, self.index = direction, view, x.device.index or 0
        self.device = device_of(x)
        self.given, self.spills = plan is not None, 0
        self.plan = plan or tuned_plan(direction, view, x, self.device)
        self.allocate(x, statistics)

    def allocate(self, x: Tensor, statistics: torch.dtype) -> None:
        """What the programs of a launch exchange, see the kernels. Launches on a stream take turns."""
        self.words = buffer(x, self.plan.groups + 1, torch.int32)
        self.partials = self.published = None
        if self.plan.split:
            # Of inference, the forward exchanges nothing: what a call of its kind needs is for its backward.
            partials, published = EXCHANGED["forward" if self.direction == "forward" else "backward"]
            sizes = (self.plan.splits * partials * self.view.channels, published * self.view.channels)
            sizes = (-(sizes[0] // -32) * 32, sizes[1])  # both begin at multiples of 128 bytes
            self.partials, self.published = buffer(x, sum(sizes), statistics)[: sum(sizes)].split(sizes)
        self.bound: dict[Any, Any] = {}

    def workspace(self, saved: Tensor) -> tuple[Tensor | None, ...]:
        published = self.published
        if published is not None and len(self.phases()) > 1:  # another thread's launches may come between
            published = saved.new_empty(published.shape)
        return self.partials, published, self.words

    def phases(self) -> tuple[tuple[bool, bool], ...]:
        """The launches: whether each makes statistics, or sums, and whether it applies them."""
        return ((True, False), (False, True)) if self.plan.strategy == "two_launch" else ((True, True),)

    def launch(self, kernel: Any, arguments: tuple[Any, ...], flags: tuple[bool, ...], inputs: Any) -> bool:
        """Launch over the plan's grid. False, and another plan, if programs that wait would not fit."""
        x = arguments[0]
        grid = (self.plan.slots, self.plan.splits, 1)
        constants = (*flags, self.plan.tile)
        with on_device(x):
            if INTERPRETED:
                kernel[grid](*arguments, *constants)
                return True
            key: tuple[Any, ...] = flags
            for t in inputs:
                key += (None,) if t is None else (t.dtype, t.data_ptr() % 16 == 0)
            run = self.bound.get(key)
            if run is None:
                compiled = kernel.warmup(*arguments, *constants, grid=grid, **self.plan.options(self.device))
                run = compiled[grid]
                self.spills = max(self.spills, compiled.n_spills)
                if self.plan.waits and not self.fits(compiled):
                    self.retreat(arguments[0], arguments[4].dtype)
                    return False
                self.bound[key] = run
            run(*arguments, *constants, stream=current_stream(self.index))
        return True

    def fits(self, compiled: Any) -> bool:
        """Whether all programs of the grid run at the same time, by what the kernel was compiled to."""
        shared = compiled.metadata.shared
        programs = self.device.co_resident(self.plan.num_warps, compiled.n_regs, shared)
        return self.plan.slots * self.plan.splits <= programs

    def retreat(self, x: Tensor, statistics: torch.dtype) -> None:
        """Plan anew without programs that wait."""
        message = f"strategy: {self.plan.strategy!r} cannot run {self.direction} on {self.view} here: its "
        message += f"{self.plan.slots * self.plan.splits} programs would not run at the same time"
        if planner.forced() or self.given:
            raise DoesNotFit(message)
        _log.debug(message)
        self.plan = planner.plan(self.direction, self.view, x.element_size(), self.device, "two_launch")
        self.allocate(x, statistics)


_calls: dict[Any, Call] = {}


def prepared(
    direction: str, x: Tensor, statistics: torch.dtype, call: Call | None = None
) -> tuple[Tensor, Call]:
    """x, or a dense copy of it, and its call, unless that is given."""
    if call is not None:
        return x, call
    captured = capturing(x)
    stream = 0 if INTERPRETED else current_stream(x.device.index or 0)
    key = (direction, x.shape, x.stride(), x.dtype, x.device, stream, planner.forced())
    call = None if captured else _calls.get(key)
    if call is None:
        view = view_of(x.shape, x.stride())
        if view is None:
            _log.debug("input of shape %s, strides %s is not dense: copied", tuple(x.shape), x.stride())
            return prepared(direction, x.clone(memory_format=torch.preserve_format), statistics)
        with on_device(x):
            call = Call(direction, view, x, statistics)
        if not captured:  # a graph owns what it was captured with
            if len(_calls) >= 4096:
                _calls.clear()
            _calls[key] = call
    return x, call


def forget_calls() -> None:
    """Plan all calls anew, each when it comes next."""
    _calls.clear()


_buffers: dict[Any, Tensor] = {}


def buffer(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """At least ``size`` zeros, which the kernels leave so where they need them so; one buffer per device,
    stream and dtype."""
    if capturing(x):
        # Zeroed by the graph's replay, not now: not for others. Only the words need it.
        make = torch.zeros if dtype == torch.int32 else torch.empty
        return make(size, dtype=dtype, device=x.device)
    key = (x.device, 0 if INTERPRETED else current_stream(x.device.index or 0), dtype)
    found = _buffers.get(key)
    if found is None or found.numel() < size:
        found = _buffers[key] = torch.zeros(max(size, 4096), dtype=dtype, device=x.device)
    return found


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """dy, or a copy of it, with the strides of x."""
    if dy.dtype == x.dtype:
        if dy.stride() == x.stride():
            return dy
        if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), dy.stride(), strict=True)):
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


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's."""
    if x.device.type == "cpu" or torch.accelerator.current_device_index() == x.device.index:
        return nullcontext()
    return torch.accelerator.device_index(x.device.index)
