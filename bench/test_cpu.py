"""A training step (forward + backward) on the CPU: BatchRenorm, torch's BatchNorm, torchrl's BatchRenorm1d.

The layers take turns in short blocks of calls, each round in another order, so that whatever else
the machine does, or one leaves to the next, meets all of them alike. A ratio is the median over rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from triton_brn._bench_measure import (
    Times,
    keep_freed_memory,
    no_garbage_collection,
    one_round,
    ratio,
    wall_clock,
)
from triton_brn._bench_peers import OURS, batch_renorm, call_of, peers

ROUNDS = 40
FIRST_STEPS = f"{OURS}, new"


@dataclass(frozen=True)
class Case:
    """An input, and how many times the time of BatchNorm ours may take."""

    shape: tuple[int, ...]
    layout: str
    calls: int  # in a block
    target: float

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout}"


CASES = [
    Case((32, 64, 56, 56), "contiguous", 1, 1.15),
    Case((32, 64, 56, 56), "channels_last", 1, 1.15),
    Case((256, 1024), "contiguous", 20, 1.35),
]
SPEEDUP = 3.0  # over torchrl, everywhere


def layers(case: Case) -> dict[str, nn.Module]:
    """The contestants, affine and training: ours as it corrects, and new, with r = 1 and d = 0."""
    wanted = [peer for peer in peers("cpu") if peer.name in (OURS, "BatchNorm", "torchrl")]
    device = torch.device("cpu")
    made = {p.name: p.make(case.shape, device, torch.float32) for p in wanted if not p.missing}
    return {FIRST_STEPS: batch_renorm(case.shape), **made}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(case: Case, benchmark, table: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "eager")
    keep_freed_memory()
    torch.manual_seed(0)
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    if case.layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    steps = {name: call_of(layer, x, dy, "both") for name, layer in layers(case).items()}
    times: Times = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up

    with no_garbage_collection():
        benchmark.pedantic(one_round, args=(steps, times, wall_clock(case.calls)), rounds=ROUNDS)
    benchmark.extra_info["ms"] = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    table.extend(report(case, times))


def report(case: Case, times: Times) -> list[str]:
    """The lines of one case: ms per step, ratios to BatchNorm, speed-up over torchrl, targets."""
    form = "  {:16}{:>10}{:>11}{:>13}{:>11}".format
    lines = ["", str(case), form("", "best ms", "median ms", "/ BatchNorm", "x torchrl")]
    for name, block in times.items():
        slower = f"{ratio(times, name, 'BatchNorm'):.2f}"
        faster = f"{ratio(times, 'torchrl', name):.1f}" if "torchrl" in times else "-"
        best, median = f"{min(block) * 1e3:.3f}", f"{statistics.median(block) * 1e3:.3f}"
        lines.append(form(name, best, median, slower, faster))
    for ours in (FIRST_STEPS, OURS):
        holds = ratio(times, ours, "BatchNorm") <= case.target
        lines.append(f"  {ours}: at most {case.target} BatchNorm: {verdict(holds)}")
        if "torchrl" in times:
            holds = ratio(times, "torchrl", ours) >= SPEEDUP
            lines.append(f"  {ours}: at least {SPEEDUP:g} times as fast as torchrl: {verdict(holds)}")
    return lines


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"
