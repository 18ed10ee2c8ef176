"""The search for a faster plan: candidates are timed on scratch copies, never on a caller's tensors."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import candidates, launch, planner
from .devices import INTERPRETED, device_of
from .planner import Plan
from .tuning_table import Entry
from .views import view_of

_log = logging.getLogger(__name__)

#: A plan must be faster than the planner's by this part of its time to take its place: a launch's time
#: varies by 1 or 2 % from one measurement to the next.
MARGIN = 0.02
#: Walks from the fastest plan so far to its neighbours, at most.
ROUNDS = 4
#: Copies of x and dy at most. They take turns, so that none is found in L2.
MOST_COPIES = 32

Benchmark = Callable[[Callable[[], object]], float]


def benchmark(run: Callable[[], object]) -> float:
    """Microseconds of a run: the median by the benchmarker of Triton's driver, a clock in the interpreter."""
    if INTERPRETED:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    return triton.runtime.driver.active.get_benchmarker()(run, quantiles=(0.5, 0.2, 0.8))[0] * 1e3


def searched(
    direction: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    deadline: float = math.inf,
) -> Entry:
    """The fastest way to run ``direction`` on such a tensor.

    Args:
        direction: "forward", "backward" or "inference".
        shape, stride, dtype, device: of x, dense.
        deadline: of ``time.monotonic()``. Once it is past, no more is tried than the planner's own plan.

    Raises:
        RuntimeError: not even the planner's own plan can be timed, for want of memory as a rule.
    """
    # A caller's inference mode would make scratch tensors that no kernel may be told to update.
    with torch.inference_mode(False), torch.no_grad(), launch.on_device(torch.empty(0, device=device)):
        scratch = Scratch(direction, shape, stride, dtype, device)
        default = planner.plan(direction, scratch.view, scratch.x.element_size(), scratch.device)
        times = {default: scratch.time(default)}
        finished = all(try_until(deadline, scratch, times, plans) for plans in rounds(scratch, times))
    best = min(times, key=lambda plan: times[plan])  # of equals, the first
    keep = times[best] > times[default] * (1 - MARGIN)
    best = default if keep else best
    _log.debug("%s %s %s: %d plans, best %s", direction, tuple(shape), dtype, len(times), best)
    choice = None if keep else candidates.choice_of(best)
    return Entry(choice, round(times[best], 3), round(times[default], 3), finished)


def rounds(scratch: Scratch, times: dict[Plan, float]) -> Iterator[list[Plan]]:
    """What to try next: every strategy, then the neighbours of the fastest, as long as one is faster."""
    call = (scratch.direction, scratch.view, scratch.x.element_size(), scratch.device)
    yield candidates.strategies(*call)
    best = None
    for _ in range(ROUNDS):
        before, best = best, min(times, key=lambda plan: times[plan])
        if best == before:
            return
        yield candidates.neighbours(best, *call)


def try_until(deadline: float, scratch: Scratch, times: dict[Plan, float], plans: list[Plan]) -> bool:
    """Time the plans that have no time yet. False: there was not enough time for all."""
    for plan in plans:
        if plan in times:
            continue
        if time.monotonic() >= deadline:
            return False
        try:
            times[plan] = scratch.time(plan)
        except Exception as error:  # whatever a compiler or a driver has against it, others may do
            times[plan] = math.inf
            _log.debug("%s cannot run: %s", plan, error)
    return True


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for rounding. They are of the size of 1."""
    tolerance = 8 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Copy:
    """Tensors of one turn."""

    x: Tensor
    dy: Tensor


class Scratch:
    """Tensors to run a direction on, which nobody else has."""

    expected: Tensor | None  # result, of the planner's own plan

    def __init__(
        self,
        direction: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        random = torch.Generator(device).manual_seed(0)  # its own: a caller's random numbers stay as they are
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def filled() -> Tensor:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_(generator=random)

        self.direction = direction
        self.expected = None
        self.x, backward = filled(), direction == "backward"
        self.device = device_of(self.x)
        view = view_of(tuple(shape), tuple(stride))
        if view is None:
            raise ValueError(f"stride: {tuple(stride)} of shape {tuple(shape)} is not dense")
        self.view = view
        ones, zeros = (torch.full((shape[1],), n, dtype=statistics, device=device) for n in (1.0, 0.0))
        self.weight, self.bias = ones, zeros
        self.running = (zeros.clone(), ones.clone(), torch.zeros((), dtype=torch.long, device=device))
        turn = self.x.numel() * self.x.element_size() * (3 if backward else 2)
        copies = 1 if INTERPRETED else min(MOST_COPIES, 1 + 2 * self.device.l2 // turn)
        dys = [filled() if backward else self.x for _ in range(copies)]
        self.copies = [Copy(self.x if i == 0 else self.x.clone(), dy) for i, dy in enumerate(dys)]
        self.saved = self.forward(self.copies[0], self.call("forward"))[1] if backward else self.x

    def call(self, direction: str, plan: Plan | None = None) -> launch.Call:
        """A call by this plan, which the launch room does not remember."""
        plan = plan or planner.plan(direction, self.view, self.x.element_size(), self.device)
        return launch.Call(direction, self.view, self.x, self.weight.dtype, plan)

    def time(self, plan: Plan) -> float:
        """Microseconds of a run by this plan. The first one timed is what the others are held against.

        Raises:
            ValueError: it spills registers, its programs would wait for ever, or its result differs.
        """
        call = self.call(self.direction, plan)
        run, turn = getattr(self, self.direction), 0

        def next_copy() -> Tensor:
            nonlocal turn
            turn += 1
            return run(self.copies[turn % len(self.copies)], call)[0]

        result = next_copy()  # compiles
        if self.expected is None:
            self.expected = result
        elif call.spills:
            raise ValueError(f"it spills {call.spills} registers")
        elif not close(result, self.expected):
            raise ValueError("its result differs")
        return benchmark(next_copy)

    def forward(self, copy: Copy, call: launch.Call) -> tuple[Tensor, Tensor]:
        """A training step's forward."""
        # Limits that take r and d away: the result does not depend on how often the statistics were updated.
        settings = (0.01, 1e-5, [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], True)
        return launch.forward(copy.x, self.weight, self.bias, *self.running, *settings, call)

    def backward(self, copy: Copy, call: launch.Call) -> tuple[Tensor, ...]:
        """A training step's backward."""
        return launch.backward(copy.dy, copy.x, self.weight, self.saved, True, (True, True, True), call)

    def inference(self, copy: Copy, call: launch.Call) -> tuple[Tensor, Tensor]:
        """The forward with running statistics."""
        return launch.inference(copy.x, self.weight, self.bias, *self.running[:2], 1e-5, False, call)
