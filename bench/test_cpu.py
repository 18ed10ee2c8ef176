"""A training step (forward + backward) on the CPU: BatchRenorm, torch's BatchNorm, torchrl's BatchRenorm1d.

The layers take turns in short blocks of calls, each round in another order, so that whatever else
the machine does meets all of them alike. A ratio is the median over rounds.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d

try:
    from torchrl.modules import BatchRenorm1d as TorchRLBatchRenorm1d
except ImportError:
    TorchRLBatchRenorm1d = None

ROUNDS = 40


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
    """The contestants, all affine, all training, with their default settings.

    torchrl's layer takes maps as they are, and is 9 to 60 % faster so than on (N*H*W, C) rows.
    Its correction is switched on from the first step; its cost does not depend on that.
    """
    channels = case.shape[1]
    maps = len(case.shape) == 4
    found: dict[str, nn.Module] = {
        "BatchNorm": nn.BatchNorm2d(channels) if maps else nn.BatchNorm1d(channels),
        "BatchRenorm": BatchRenorm2d(channels) if maps else BatchRenorm1d(channels),
    }
    if TorchRLBatchRenorm1d is not None:
        found["torchrl"] = TorchRLBatchRenorm1d(channels, warmup_steps=0)
    return found


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return step


Times = dict[str, list[float]]


def one_round(steps: dict[str, Callable[[], None]], times: Times, calls: int) -> None:
    """One block of every layer; the layer that begins is another one each round."""
    names = list(steps)
    first = len(times[names[0]]) % len(names)
    for name in names[first:] + names[:first]:
        start = perf_counter()
        for _ in range(calls):
            steps[name]()
        times[name].append((perf_counter() - start) / calls)


def ratio(times: Times, over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_step(case: Case, benchmark, table: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "eager")
    torch.manual_seed(0)
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    if case.layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    steps = {name: training_step(layer, x, dy) for name, layer in layers(case).items()}
    times: Times = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up

    gc.disable()
    try:
        benchmark.pedantic(one_round, args=(steps, times, case.calls), rounds=ROUNDS)
    finally:
        gc.enable()
    benchmark.extra_info["ms"] = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    table.extend(report(case, times))


def report(case: Case, times: Times) -> list[str]:
    """The lines of one case: ms per step, ratios to BatchNorm, speed-up over torchrl, targets."""
    form = "  {:12}{:>10}{:>11}{:>13}{:>11}".format
    lines = ["", str(case), form("", "best ms", "median ms", "/ BatchNorm", "x torchrl")]
    for name, block in times.items():
        slower = f"{ratio(times, name, 'BatchNorm'):.2f}"
        faster = f"{ratio(times, 'torchrl', name):.1f}" if "torchrl" in times else "-"
        best, median = f"{min(block) * 1e3:.3f}", f"{statistics.median(block) * 1e3:.3f}"
        lines.append(form(name, best, median, slower, faster))
    holds = ratio(times, "BatchRenorm", "BatchNorm") <= case.target
    lines.append(f"  target: at most {case.target} BatchNorm: {verdict(holds)}")
    if "torchrl" in times:
        holds = ratio(times, "torchrl", "BatchRenorm") >= SPEEDUP
        lines.append(f"  target: at least {SPEEDUP:g} times as fast as torchrl: {verdict(holds)}")
    return lines


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"
