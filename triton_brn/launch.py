"""The launch room: from tensors to kernel launches. Only this module calls device code."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor

from . import planner
from .arguments import alignment, dtype_of, laid_out_as, numbers, resolved
from .devices import INTERPRETED, PER_THREAD, capturing, current_stream, device_of, on_device
from .kernels.backward import batch_renorm_backward_kernel
from .kernels.forward import batch_renorm_forward_kernel
from .kernels.inference import batch_renorm_inference_kernel
from .plans import Plan
from .tuned import tuned_plan
from .views import View, view_of
from .workspaces import buffer

_log = logging.getLogger(__name__)


def forward(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, step, momentum, eps, r_max, d_max, average_std, call=None
):
    """Algorithm 1 of Ioffe (2017); updates the running statistics. Returns y and saved (5, C).

    Whatever can be refused is refused before the first launch: the statistics are as they were.
    """
    given, rest = (
        (x, weight, bias, running_mean, running_var, step),
        (momentum, eps, r_max, d_max, average_std),
    )
    aligned = alignment(given)
    if aligned is None:
        return forward_resolved(given, (*rest, call))
    x, call = prepared("forward", x, running_mean.dtype, call)
    if x is not given[0]:  # a copy, which begins elsewhere
        return forward(x, *given[1:], *rest, call)
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, call.view.channels))
    running = (running_mean, running_var, step)
    settings = numbers((momentum, eps, tuple(r_max), tuple(d_max)))
    arguments = (x, y, (weight, bias), running, saved, call.workspace(saved), *call.view, settings)
    flags = [(*phase, *call.how, average_std) for phase in call.phases]
    if not call.launch(batch_renorm_forward_kernel, arguments, flags, (aligned, dtype_of(weight, bias))):
        return forward(x, *given[1:], *rest, call.retreated(x, saved.dtype))
    torch.autograd.graph.increment_version([t for t in running if t is not None])  # autograd saw nothing
    return y, saved


def forward_resolved(given, rest):  # type: ignore[no-untyped-def]
    """``forward`` where some tensor's memory does not hold its values: on copies, copied back if updated."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    for name, t in zip(names, given[3:], strict=True):
        if t is not None and t._is_zerotensor():
            raise ValueError(
                f"{name}: expected a tensor with memory to update, got a zero tensor; clone() it"
            )
    plain = [resolved(t) for t in given]
    results = forward(*plain, *rest)
    for t, p in zip(given[3:], plain[3:], strict=True):
        if t is not p:
            t.copy_(p)
    return results


def kept_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``forward``, and what ``again`` takes."""
    y, saved = forward(*args)
    return y, saved, saved


def again(x, weight, bias, saved, call=None):  # type: ignore[no-untyped-def]
    """y of a forward that saved these numbers, and them."""
    given = (x, weight, bias, saved)
    aligned = alignment(given)
    if aligned is None:
        x, weight, bias, saved = map(resolved, given)
        return again(x, weight, bias, saved, call)
    x, call = prepared("inference", x, saved.dtype, call)
    if x is not given[0]:
        return again(x, weight, bias, saved, call)
    y = torch.empty_like(x)
    arguments = (x, y, (weight, bias), (None, None), saved, *call.view, numbers(0.0))
    call.launch(batch_renorm_inference_kernel, arguments, [(False,)], (aligned, dtype_of(weight, bias)))
    return y, saved


def statistics(*args: Any) -> Tensor:
    """The first half of ``forward``; y, which comes of the same launch, waits for its ``normalise``."""
    y, saved = forward(*args)
    saved._triton_brn_y = y  # type: ignore[attr-defined]
    return saved


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor) -> Tensor:
    """The second half of ``forward``; again if it comes again."""
    y = saved.__dict__.pop("_triton_brn_y", None)
    return again(x, weight, bias, saved)[0] if y is None else y


def inference(x, weight, bias, running_mean, running_var, eps, save, call=None):  # type: ignore[no-untyped-def]
    """Normalise with the running statistics. Returns y and, if ``save``, saved (5, C)."""
    given = (x, weight, bias, running_mean, running_var)
    aligned = alignment(given)
    if aligned is None:
        x, weight, bias, running_mean, running_var = map(resolved, given)
        return inference(x, weight, bias, running_mean, running_var, eps, save, call)
    x, call = prepared("inference", x, running_mean.dtype, call)
    if x is not given[0]:
        return inference(x, weight, bias, running_mean, running_var, eps, save, call)
    y = torch.empty_like(x)
    saved = running_mean.new_empty((5, call.view.channels) if save else 0)
    arguments = (x, y, (weight, bias), given[3:], saved, *call.view, numbers(eps))
    call.launch(batch_renorm_inference_kernel, arguments, [(save,)], (aligned, dtype_of(weight, bias)))
    return y, saved


def backward(dy, x, weight, saved, training, needs, call=None):  # type: ignore[no-untyped-def]
    """Gradients with respect to x, weight and bias; empty tensors where ``needs`` says False."""
    given = (dy, x, weight, saved)
    aligned = alignment(given)
    if aligned is None:
        dy, x, weight, saved = map(resolved, given)
        return backward(dy, x, weight, saved, training, needs, call)
    x, call = prepared("backward" if training else "inference", x, saved.dtype, call)
    dy = laid_out_as(x, dy)
    if dy is not given[0] or x is not given[1]:
        return backward(dy, x, weight, saved, training, needs, call)
    like = saved if weight is None else weight
    channels = call.view.channels
    dx = torch.empty_like(x) if needs[0] else None
    wanted = needs[1] or needs[2]
    grads = (like.new_empty(channels), like.new_empty(channels)) if wanted else (None, None)
    arguments = (x, dy, dx, weight, saved, grads, call.workspace(saved), *call.view)
    if dx is None:
        phases: tuple[tuple[bool, bool], ...] = ((True, False),)
    else:
        phases = call.phases if training else ((wanted, True),)
    flags = [(training, *phase, *call.how) for phase in phases]
    key = (aligned, like.dtype, saved.dtype, dx is None, wanted)
    if not call.launch(batch_renorm_backward_kernel, arguments, flags, key):
        return backward(dy, x, weight, saved, training, needs, call.retreated(x, saved.dtype))
    return x.new_empty(0) if dx is None else dx, *(like.new_empty(0) if g is None else g for g in grads)


class DoesNotFit(ValueError):
    """The plan that was asked for has more programs that wait than run at the same time."""


#: Numbers per channel that a split hands in, and that are published, see the kernels.
EXCHANGED = {"forward": (3, 2), "backward": (2, 3)}
#: How CUDA and HIP refuse a launch of more waiting programs than a green context, or a partition, can hold.
TOO_MANY = "too many blocks in cooperative launch"
#: Triton's interpreter exchanges its language's functions while a kernel runs; its compiler is not said to
#: serve several threads at a time.
_one_thread = threading.Lock()


class Call:
    """All that calls of one kind share: view, plan, workspace, compiled kernels. Tuning gives a plan.

    Threads share it: nothing changes but what is found in ``bound``.
    """

    key: Any = None  # where it is kept for the next call; None: nowhere

    def __init__(
        self, direction: str, view: View, x: Tensor, statistics: torch.dtype, plan: Plan | None = None
    ) -> None:
        self.direction, self.view = direction, view
        self.device = device_of(x)
        self.stream = 0 if INTERPRETED else current_stream(x.device.index or 0)
        self.given, self.spills = plan is not None, 0
        self.plan = plan or tuned_plan(direction, view, x, self.device)
        self.how = (self.plan.kept, self.plan.split)
        #: The launches: whether each makes statistics, or sums, and whether it applies them.
        two = self.plan.strategy == "two_launch"
        self.phases = ((True, False), (False, True)) if two else ((True, True),)
        self.allocate(x, statistics)
        self.bound: dict[Any, Any] = {}

    def allocate(self, x: Tensor, statistics: torch.dtype) -> None:
        """What the programs of a launch exchange, see the kernels. Launches on a stream take turns."""
        stream = shared_stream(x)
        self.words = buffer(x, self.plan.groups + 1, torch.int32, stream)
        self.partials = self.published = None
        if self.plan.split:
            # Of inference, the forward exchanges nothing: what a call of its kind needs is for its backward.
            partials, published = EXCHANGED["forward" if self.direction == "forward" else "backward"]
            sizes = (self.plan.splits * partials * self.view.channels, published * self.view.channels)
            sizes = (-(sizes[0] // -32) * 32, sizes[1])  # both begin at multiples of 128 bytes
            self.partials, self.published = buffer(x, sum(sizes), statistics, stream)[: sum(sizes)].split(
                sizes
            )

    def workspace(self, saved: Tensor) -> tuple[Tensor | None, ...]:
        published = self.published
        if published is not None and len(self.phases) > 1:  # another thread's launches may come between
            published = saved.new_empty(published.shape)
        return self.partials, published, self.words

    def launch(
        self, kernel: Any, arguments: tuple[Any, ...], phases: list[tuple[bool, ...]], key: Any
    ) -> bool:
        """Launch over the plan's grid, once for the flags of each phase. All are compiled before the first
        one runs. False, and nothing has run: programs that wait would not fit.

        key: what else the compiler takes into account.
        """
        tile = self.plan.tile
        with on_device(arguments[0]):
            if INTERPRETED:
                with _one_thread:
                    for flags in phases:
                        kernel[self.plan.slots, self.plan.splits, 1](*arguments, *flags, tile)
                return True
            runs = []
            for flags in phases:
                run = self.bound.get((flags, key)) or self.compiled(kernel, arguments, flags, key)
                if run is None:
                    return False
                runs.append(run)
            try:
                for flags, run in zip(phases, runs, strict=True):
                    run(*arguments, *flags, tile, stream=self.stream)
            except RuntimeError as error:
                if self.plan.waits and TOO_MANY in str(error):
                    return False
                raise
        return True

    def compiled(self, kernel: Any, arguments: tuple[Any, ...], flags: tuple[bool, ...], key: Any) -> Any:
        """The kernel over the plan's grid, compiled. None if its programs wait and would not fit."""
        with _one_thread:
            if (flags, key) in self.bound:  # another thread was quicker
                return self.bound[flags, key]
            grid, options = (self.plan.slots, self.plan.splits, 1), self.plan.options(self.device)
            compiled = kernel.warmup(*arguments, *flags, self.plan.tile, grid=grid, **options)
            run = compiled[grid]
            self.spills = max(self.spills, compiled.n_spills)
            if self.plan.waits and not self.fits(compiled):
                return None
            self.bound[flags, key] = run
            return run

    def fits(self, compiled: Any) -> bool:
        """Whether all programs of the grid run at the same time, by what the kernel was compiled to."""
        shared = compiled.metadata.shared
        programs = self.device.co_resident(self.plan.num_warps, compiled.n_regs, shared)
        return self.plan.slots * self.plan.splits <= programs

    def retreated(self, x: Tensor, statistics: torch.dtype) -> Call:
        """The call to make instead: one without programs that wait."""
        message = f"strategy: {self.plan.strategy!r} cannot run {self.direction} on {self.view} here: its "
        message += f"{self.plan.slots * self.plan.splits} programs would not run at the same time"
        if planner.forced() or self.given:
            raise DoesNotFit(message)
        _log.debug(message)
        plan = planner.plan(self.direction, self.view, x.element_size(), self.device, "two_launch")
        with on_device(x):
            call = Call(self.direction, self.view, x, statistics, plan)
        if self.key is not None:
            keep(self.key, call)
        return call


_calls: dict[Any, Call] = {}


def prepared(
    direction: str, x: Tensor, statistics: torch.dtype, call: Call | None = None
) -> tuple[Tensor, Call]:
    """x, or a dense copy of it, and its call, unless that is given."""
    if call is not None:
        return x, call
    stream = shared_stream(x)
    key = (direction, x.shape, x.stride(), x.dtype, x.device, stream, planner.forced())
    call = None if stream is None else _calls.get(key)
    if call is None:
        view = view_of(x.shape, x.stride())
        if view is None:
            _log.debug("input of shape %s, strides %s is not dense: copied", tuple(x.shape), x.stride())
            return prepared(direction, x.clone(memory_format=torch.preserve_format), statistics)
        with on_device(x):
            call = Call(direction, view, x, statistics)
        if stream is not None:
            keep(key, call)
    return x, call


def shared_stream(x: Tensor) -> int | None:
    """The handle of the current stream of x's device. None if calls on it share nothing with later ones: a
    graph owns what it was captured with, and one handle stands for a stream of each thread."""
    if INTERPRETED:
        return 0
    stream = current_stream(x.device.index or 0)
    return None if stream == PER_THREAD or capturing(x) else stream


def keep(key: Any, call: Call) -> None:
    """Have later calls find ``call``."""
    if len(_calls) >= 4096:
        _calls.clear()
    call.key = key
    _calls[key] = call


def forget_calls() -> None:
    """Plan all calls anew, each when it comes next."""
    _calls.clear()
