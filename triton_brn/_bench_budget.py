"""How long a run may take: what torch.compile gets of it, and what each measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

from ._bench_measure import Effort


class Compiling:
    """The seconds that torch.compile may take in all: it takes some for each input."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, 0.0

    @property
    def refusal(self) -> str:
        """Why nothing more is compiled; empty if it is."""
        if not self.seconds:
            return "not compiled: --compile-seconds 0"
        if self.spent >= self.seconds:
            return f"not compiled: --compile-seconds {self.seconds:g} were used up"
        return ""

    @contextmanager
    def counted(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.spent += perf_counter() - start


class Budget:
    """The seconds of a run, shared by the directions that are left to measure.

    Args:
        effort: for one timer of one direction, at most.
        directions: of all inputs.
        seconds: from now on, for all of it; None: no limit. Each direction's least rounds are run anyway.
        compile_seconds: of these, for torch.compile at most.
    """

    def __init__(
        self, effort: Effort, directions: int, seconds: float | None, compile_seconds: float
    ) -> None:
        self.most, self.directions, self.seconds = effort, directions, seconds
        self.compiling = Compiling(compile_seconds)
        self.start = perf_counter()

    def estimate(self, timers: int) -> float:
        """Seconds that the run takes, about: unless there is a limit, what each direction may take, and a
        fifth more for making its contestants ready."""
        most = self.directions * timers * self.most.seconds * 1.2 + self.compiling.seconds
        return most if self.seconds is None else min(most, self.seconds)

    def next_effort(self, timers: int) -> Effort:
        """Of each timer of the next direction."""
        if self.seconds is None:
            return self.most
        reserved = max(0.0, self.compiling.seconds - self.compiling.spent)
        left = max(0.0, self.seconds - reserved - (perf_counter() - self.start))
        share = left / self.directions / timers
        self.directions -= 1
        return replace(self.most, seconds=min(self.most.seconds, share))
