"""The search for a faster plan: candidates are timed on scratch copies, never on a caller's tensors."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import candidates, launch, planner
from .devices import INTERPRETED, device_of, on_device
from .plans import Choice, Plan
from .tuning import Size
from .tuning_table import Entry
from .views import view_of

_log = logging.getLogger(__name__)

#: A plan must be faster than the planner's by this part of its time to take its place: a launch's time
#: varies by 1 or 2 % from one measurement to the next.
MARGIN = 0.02
#: Walks from the fastest plan so far to its neighbours, at most.
ROUNDS = 4
#: Copies of x and dy at most. They take turns, so that none is found in L2. Triton's benchmarkers for GPUs
#: clear L2 besides; of inputs of a few KiB, so many copies would not.
MOST_COPIES = 256


def benchmark(run: Callable[[], object]) -> float:
    """Microseconds of a run: the median by the benchmarker of Triton's driver, a clock in the interpreter."""
    if INTERPRETED:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    return triton.runtime.driver.active.get_benchmarker()(run, quantiles=(0.5, 0.2, 0.8))[0] * 1e3


def searched(direction: str, size: Size, deadline: float = math.inf, before: Entry | None = None) -> Entry:
    """The fastest way to run ``direction`` on such a tensor.

    Args:
        direction: "forward", "backward" or "inference".
        size: of x, dense.
        deadline: of ``time.monotonic()``. Once it is past, no more is tried than the planner's own plan.
        before: what a search that was not finished has found; what it tried is not tried again.

    Raises:
        RuntimeError: not even the planner's own plan can be timed, for want of memory as a rule.
    """
    with scratch_for(direction, size) as scratch:
        default, default_us = timed_default(scratch)
        times, known = {default: default_us}, recalled(scratch, before, default_us)
        finished = all(try_until(deadline, scratch, times, known, plans) for plans in rounds(scratch, times))
    best = min(times, key=lambda plan: times[plan])  # of equals, the first
    keep = times[best] > default_us * (1 - MARGIN)
    best = default if keep else best
    _log.debug("%s %s: %d plans, best %s", direction, size, len(times), best)
    choice = None if keep else best.choice
    tried = [] if finished else [(plan.choice, us) for plan, us in times.items()][1:]
    kept = tuple((other, round(us, 3) if math.isfinite(us) else None) for other, us in tried)
    return Entry(choice, round(times[best], 3), round(default_us, 3), finished, scratch.view, kept)


def timed(direction: str, size: Size, choice: Choice | None) -> tuple[float, float, str]:
    """Microseconds of a call as chosen, and of one by the planner's own plan; the strategy of the former,
    "default" where both are the same."""
    with scratch_for(direction, size) as scratch:
        default, default_us = timed_default(scratch)
        plan = default if choice is None else candidates.planned(choice, *scratch.call) or default
        if plan == default:
            return default_us, default_us, "default"
        us = timed_as_called(scratch, plan)[1]
        return us, default_us, plan.strategy


@contextmanager
def scratch_for(direction: str, size: Size) -> Iterator[Scratch]:
    """Scratch tensors, with their device the current one."""
    # A caller's inference mode would make tensors that no kernel may be told to update.
    with torch.inference_mode(False), torch.no_grad(), on_device(torch.empty(0, device=size.device)):
        yield Scratch(direction, size)


def timed_default(scratch: Scratch) -> tuple[Plan, float]:
    """What a call runs by that nothing was tuned for, and its microseconds."""
    return timed_as_called(scratch, planner.plan(*scratch.call))


def timed_as_called(scratch: Scratch, plan: Plan) -> tuple[Plan, float]:
    """What a call that has this plan runs by, and its microseconds: whatever its registers, and in two
    launches where its programs would not run at the same time."""
    try:
        return plan, scratch.time(plan, refuse=False)
    except launch.DoesNotFit:
        plan = planner.plan(*scratch.call, "two_launch")
        return plan, scratch.time(plan, refuse=False)


def recalled(scratch: Scratch, before: Entry | None, default_us: float) -> dict[Plan, float]:
    """What was tried before, as long as it would take now: by the time of the planner's own plan."""
    if before is None or before.view != scratch.view:
        return {}
    slower = default_us / before.default_us
    plans = ((candidates.planned(other, *scratch.call), us) for other, us in before.tried)
    return {plan: math.inf if us is None else us * slower for plan, us in plans if plan is not None}


def rounds(scratch: Scratch, times: dict[Plan, float]) -> Iterator[list[Plan]]:
    """What to try next: every strategy, then the neighbours of the fastest, as long as one is faster."""
    yield candidates.strategies(*scratch.call)
    best = None
    for _ in range(ROUNDS):
        before, best = best, min(times, key=lambda plan: times[plan])
        if best == before:
            return
        yield candidates.neighbours(best, *scratch.call)


def try_until(
    deadline: float, scratch: Scratch, times: dict[Plan, float], known: dict[Plan, float], plans: list[Plan]
) -> bool:
    """Time the plans that have no time yet, known or measured. False: there was not enough time for all."""
    for plan in plans:
        if plan in known:
            times.setdefault(plan, known[plan])
        if plan in times:
            continue
        if time.monotonic() >= deadline:
            return False
        try:
            times[plan] = scratch.time(plan)
        except Exception as error:  # whatever a compiler or a driver has against it, others may do
            scratch.weight.sum().item()  # a device that is broken says so, and ends the search
            times[plan] = math.inf
            _log.debug("%s cannot run: %s", plan, error)
    return True


def close(a: Tensor, b: Tensor, size: float = 1.0) -> bool:
    """Whether two results, of this size, are the same but for rounding."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 8 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)


@dataclass(frozen=True)
class Copy:
    """Tensors of one turn."""

    x: Tensor
    dy: Tensor


class Scratch:
    """Tensors to run a direction on, which nobody else has.

    Attributes:
        call: what a plan is made for.
        x: one of the inputs.
        device: where they are.
        expected: the results of the first plan that was timed.
    """

    def __init__(self, direction: str, size: Size) -> None:
        shape, stride, dtype, device = size.shape, size.stride, size.dtype, size.device
        random = torch.Generator(device).manual_seed(0)  # its own: a caller's random numbers stay as they are
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def filled() -> Tensor:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_(generator=random)

        def line(first: float, last: float) -> Tensor:
            return torch.linspace(first, last, shape[1], dtype=statistics, device=device)

        view = view_of(shape, stride)
        if view is None:
            raise ValueError(f"stride: {stride} of shape {shape} is not dense")
        self.x, self.view, backward = filled(), view, direction == "backward"
        self.direction, self.device = direction, device_of(self.x)
        self.call = (direction, view, self.x.element_size(), self.device)
        self.expected: list[Tensor] = []
        self.weight, self.bias = line(0.5, 1.5), line(-1.0, 1.0)
        # With the limits below, some channels' r and d are clipped and some are not.
        step = torch.zeros((), dtype=torch.long, device=device)
        self.start = (line(-1.0, 1.0), line(0.5, 2.0), step)
        self.running = self.started()
        turn = self.x.numel() * self.x.element_size() * (3 if backward else 2)
        copies = 1 if INTERPRETED else min(MOST_COPIES, 1 + 2 * self.device.l2 // turn)
        dys = [filled() if backward else self.x for _ in range(copies)]
        self.copies = [Copy(self.x if i == 0 else self.x.clone(), dy) for i, dy in enumerate(dys)]
        if backward:
            plan = planner.plan("forward", *self.call[1:], "two_launch")
            self.saved = self.forward(self.copies[0], self.given(plan, "forward"))[1]

    def started(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running statistics and number of steps, as every plan begins with them."""
        mean, var, step = self.start
        return mean.clone(), var.clone(), step.clone()

    def given(self, plan: Plan, direction: str) -> launch.Call:
        """A call by this plan, which the launch room does not remember."""
        return launch.Call(direction, self.view, self.x, self.weight.dtype, plan)

    def time(self, plan: Plan, refuse: bool = True) -> float:
        """Microseconds of a run by this plan. The first one timed is what the others are held against.

        Raises:
            DoesNotFit: its programs would wait for ever.
            ValueError: it spills registers, or its results differ. Only with ``refuse``.
        """
        call = self.given(plan, self.direction)
        results = self.results(call)  # compiles
        self.running = self.started()
        if not self.expected:
            self.expected = results
        elif refuse and call.spills:
            raise ValueError(f"it spills {call.spills} registers")
        elif refuse and not all(map(close, results, self.expected, self.sizes)):
            raise ValueError("its results differ")
        run, turn = getattr(self, self.direction), 0

        def next_copy() -> None:
            nonlocal turn
            turn += 1
            run(self.copies[turn % len(self.copies)], call)

        return benchmark(next_copy)

    def results(self, call: launch.Call) -> list[Tensor]:
        """All that a first run leaves, statistics too."""
        self.running = self.started()
        results = [*getattr(self, self.direction)(self.copies[0], call)]
        return results + [*self.running] if self.direction == "forward" else results

    @property
    def sizes(self) -> list[float]:
        """Of the results: gradients of weight and bias are sums over a channel."""
        if self.direction == "backward":
            return [1.0, *[math.sqrt(self.view.outer * self.view.inner)] * 2]
        return [1.0] * len(self.expected)

    def forward(self, copy: Copy, call: launch.Call) -> tuple[Tensor, Tensor]:
        """A training step's forward."""
        settings = (0.01, 1e-5, [1.25, 1.25, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0], True)
        return launch.forward(copy.x, self.weight, self.bias, *self.running, *settings, call)

    def backward(self, copy: Copy, call: launch.Call) -> tuple[Tensor, ...]:
        """A training step's backward."""
        return launch.backward(copy.dy, copy.x, self.weight, self.saved, True, (True, True, True), call)

    def inference(self, copy: Copy, call: launch.Call) -> tuple[Tensor, Tensor]:
        """The forward with running statistics."""
        return launch.inference(copy.x, self.weight, self.bias, *self.running[:2], 1e-5, False, call)
