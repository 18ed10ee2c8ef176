"""What a call costs the host: batch_renorm on the kernels' path, with a launcher that launches nothing.

Beside it, in turns, F.batch_norm on a CPU tensor of the same tiny shape, which does its little work. The
ratio says how long a GPU waits for its next kernel, wherever kernels are short.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cpu import verdict
from torch.nn import functional as F

from triton_brn import backend, batch_renorm
from triton_brn._bench_measure import Times, one_round, ratio, wall_clock
from triton_brn.planner import plan
from triton_brn.plans import Device

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

H100 = Device("cuda:90", 132, 90, (3, 9), l2=50 << 20)
TARGETS = {"forward": 3.0, "forward + backward": 2.0}
SHAPES = [(8, 16, 4, 4), (64, 32)]


class Compiled:
    """A compiled kernel that does nothing when it is launched."""

    n_regs, n_spills = 128, 0
    metadata = SimpleNamespace(shared=0)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, stream: None


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch room with an H100 that is not there."""
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(backend, "obstacle", lambda kind: "")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "device_of", lambda x: H100)
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    monkeypatch.setattr(
        launch, "tuned_plan", lambda how, view, x, gpu: plan(how, view, x.element_size(), gpu)
    )
    for which in ("forward", "backward", "inference"):
        kernel = type("Kernel", (), {"warmup": lambda self, *args, **kwargs: Compiled()})()
        monkeypatch.setattr(launch, f"batch_renorm_{which}_kernel", kernel)


@pytest.mark.parametrize("direction", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_host(shape: tuple[int, ...], direction: str, stub: None, benchmark, table: list[str]) -> None:
    channels, backward = shape[1], direction != "forward"
    x, dy = torch.randn(shape, requires_grad=backward), torch.randn(shape)
    weight, bias = (torch.ones(channels, requires_grad=backward) for _ in range(2))
    mean, var, step = torch.zeros(channels), torch.ones(channels), torch.tensor(0)
    inputs = [x, weight, bias]
    norm = functools.partial(F.batch_norm, x, mean, var, weight, bias, training=True)
    renorm = functools.partial(
        batch_renorm, x, mean, var, weight, bias, training=True, num_batches_tracked=step
    )

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(forward(), inputs, dy)

        return run

    steps: dict[str, Callable[[], Any]] = {"F.batch_norm": norm, "batch_renorm": renorm}
    if backward:
        steps = {name: both(forward) for name, forward in steps.items()}
    for run in steps.values():
        run()
    times: Times = {name: [] for name in steps}
    benchmark.pedantic(one_round, args=(steps, times, wall_clock(100)), rounds=40)
    times_over = ratio(times, "batch_renorm", "F.batch_norm")
    best = {name: min(t) * 1e6 for name, t in times.items()}
    target = TARGETS[direction]
    table.append(
        f"{shape!s:16} host, {direction:20} F.batch_norm {best['F.batch_norm']:6.1f} us   batch_renorm "
        f"{best['batch_renorm']:6.1f} us   ratio {times_over:.2f}, at most {target:g}: "
        f"{verdict(times_over <= target)}"
    )
