"""Ramp: a clipping limit that changes linearly with the number of batches seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias, TypeGuard


@dataclass(frozen=True)
class Ramp:
    """A limit that stays at ``start``, then rises or falls linearly to ``stop``.

    The position is ``num_batches_tracked`` before the batch is counted: 0 for the first batch.
    The value is ``start`` up to ``begin`` and ``stop`` from ``end`` on. It is evaluated on the
    device, without a host synchronisation.

    Ioffe (2017), section 4.1: r_max is 1 for 5,000 steps, then rises to 3 at 40,000:
    ``Ramp(1.0, 3.0, begin=5_000, end=40_000)``.

    Raises:
        TypeError: a field is no number.
        ValueError: ``end < begin``, or a number that is negative or NaN.
    """

    start: float
    stop: float
    begin: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "stop", "begin", "end"):
            object.__setattr__(self, name, plain(getattr(self, name), f"Ramp: expected a number as {name}"))
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"Ramp: expected 0 <= begin <= end, got begin={self.begin}, end={self.end}")
        for name in ("start", "stop"):
            value = getattr(self, name)
            if not 0 <= value < math.inf and self.start != self.stop:
                raise ValueError(f"Ramp: expected a finite {name} >= 0, got {value}")

    def at(self, step: int) -> float:
        """The limit for the batch that ``step`` batches came before."""
        if step >= self.end:
            return self.stop
        if step <= self.begin:
            return self.start
        return self.start + (self.stop - self.start) * (step - self.begin) / (self.end - self.begin)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an integer or real number, numpy's included."""
    return isinstance(value, (int, float, Real))  # in this order: Real takes longer to see


def plain(number: float, expected: str = "expected a number") -> Any:
    """Python's int or float for ``number``, which may be numpy's.

    Raises:
        TypeError: it is no number.
    """
    if not is_number(number):
        raise TypeError(f"{expected}, got {number!r}")
    return int(number) if isinstance(number, Integral) else float(number)


#: A clipping limit as users write it: a number, None for no clipping, or a Ramp.
Limit: TypeAlias = "float | Ramp | None"


def as_ramp(name: str, limit: Limit, least: float) -> Ramp:
    """The Ramp that a user's limit means; ``least`` is the smallest value that makes sense."""
    if limit is None:
        limit = math.inf
    elif isinstance(limit, bool) or not (isinstance(limit, Ramp) or is_number(limit)):
        raise TypeError(f"{name}: expected a number, None or a Ramp, got {type(limit).__name__}")
    smallest = min(limit.start, limit.stop) if isinstance(limit, Ramp) else limit
    if not smallest >= least:
        raise ValueError(f"{name}: expected values >= {least:g}, got {limit}")
    return limit if isinstance(limit, Ramp) else Ramp(float(limit), float(limit))
