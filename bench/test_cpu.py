"""pytest-benchmark's run on the CPU of what ``python -m triton_brn bench`` measures, and the targets.

The contestants take turns in short blocks of calls, each round in another order, so that whatever else
the machine does, or one leaves to the next, meets all of them alike. A ratio is the median over rounds.
Compiled contestants are left out: with them a run takes more than 2 minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from triton_brn._bench_budget import Compiling
from triton_brn._bench_cases import DIRECTIONS, Case, default_cases
from triton_brn._bench_measure import (
    Call,
    Times,
    block_of,
    keep_freed_memory,
    no_garbage_collection,
    one_round,
    ratio,
    wall_clock,
)
from triton_brn._bench_peers import OURS, Peer, batch_renorm, peers
from triton_brn._bench_run import Layers, Measured, Row, contestants, ready, stamped_rows

CPU = torch.device("cpu")
FIRST_STEPS = f"{OURS}, new"  # r = 1 and d = 0


class Target(NamedTuple):
    """How many times the time of BatchNorm a training step of ours may take."""

    at_most: float
    calls: int  # in a block: the first of them finds its tensors where others have left the caches


TARGETS = {
    Case((32, 64, 56, 56)): Target(1.15, 1),
    Case((32, 64, 56, 56), layout="channels_last"): Target(1.15, 1),
    Case((256, 1024)): Target(1.35, 20),
}
MEDIAN = 1.1  # of all inputs
SPEEDUP = 3.0  # over torchrl, wherever there is a target
CASES = list(dict.fromkeys([*default_cases("fp32", large=False, quick=False), *TARGETS]))


class Prepared(NamedTuple):
    """An input, and the contestants that have run it."""

    case: Case
    x: Tensor
    dy: Tensor
    layers: Layers
    notes: dict[str, str]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(rows: list[Row], table: list[str]) -> Iterator[None]:
    """Plain PyTorch, whatever Triton could do here; in the end the target over all inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_BRN_BACKEND", "eager")
        keep_freed_memory()
        yield
    steps = [1 / r.speedup for r in rows if (r.peer, r.direction) == ("BatchNorm", "both") and r.speedup]
    if len(steps) == len(CASES):
        median = statistics.median(steps)
        table.append(
            f"{OURS}: median over the inputs: {median:.2f} BatchNorm, at most {MEDIAN}: "
            f"{verdict(median <= MEDIAN)}"
        )


@pytest.fixture(scope="module", params=CASES, ids=str)
def prepared(request: pytest.FixtureRequest) -> Prepared:
    case: Case = request.param
    tensors = case.tensors(CPU)
    layers, notes = contestants(case, tensors, DIRECTIONS, Compiling(0))
    for peer in peers("cpu"):
        if peer.compiled:
            del notes[peer.name]
    new = Peer(FIRST_STEPS, batch_renorm)
    layers[FIRST_STEPS] = new, new.make(case.shape, CPU, tensors[0].dtype)
    return Prepared(case, *tensors, layers, notes)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cpu(prepared: Prepared, direction: str, benchmark, rows: list[Row], table: list[str]) -> None:
    case, x, dy, layers, notes = prepared
    calls, failed = ready(layers, x, dy, direction)
    times: Times = {name: [] for name in calls}
    target = TARGETS.get(case) if direction == "both" else None
    block, number = (target.calls, 40) if target else (block_of(calls), rounds_within(1.0, calls))
    with no_garbage_collection():
        benchmark.pedantic(one_round, args=(calls, times, wall_clock(block)), rounds=number)
    benchmark.extra_info["ms"] = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    rows += stamped_rows(case, x, direction, layers, Measured(times=times, notes={**notes, **failed}))
    if target:
        table.extend(verdicts(case, times, target))


def rounds_within(seconds: float, calls: dict[str, Call]) -> int:
    """5 to 40."""
    start = perf_counter()
    one_round(calls, {name: [] for name in calls}, wall_clock(block_of(calls)))
    return max(5, min(40, int(seconds / (perf_counter() - start))))


def verdicts(case: Case, times: Times, target: Target) -> list[str]:
    """The targets of a training step, one line each."""
    lines = []
    for ours in (FIRST_STEPS, OURS):
        slower = ratio(times, ours, "BatchNorm")
        held = verdict(slower <= target.at_most)
        lines.append(f"{case}: {ours}: {slower:.2f} BatchNorm, at most {target.at_most}: {held}")
        if "torchrl" in times:
            faster = ratio(times, "torchrl", ours)
            held = verdict(faster >= SPEEDUP)
            lines.append(
                f"{case}: {ours}: {faster:.1f} times as fast as torchrl, at least {SPEEDUP:g}: {held}"
            )
    return lines


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"
