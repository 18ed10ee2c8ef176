"""The launch room where kernels are compiled: what is kept between calls, and what is not.

On a GPU or an emulator of one. Triton's interpreter launches kernels itself, one program after another.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import batch_renorm_reference, inputs
from test_kernels import assert_nobody_waits, check, run

from triton_brn import batch_renorm, forced_strategy, workspaces

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="Triton's interpreter compiles nothing")

SHAPE = (64, 3, 9, 9)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(workspaces, "_buffers", {})


def test_a_grid_that_does_not_fit_falls_back(device, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(launch.Call, "fits", lambda self, compiled: False)
    case = inputs(SHAPE, device=device)
    before = case.running_mean.clone()
    with pytest.raises(ValueError, match=r"strategy: 'cooperative' cannot run forward .* same time"):
        run(case, "cooperative", training=True)
    assert torch.equal(case.running_mean, before)
    large = (8, 40, 40, 40)
    caplog.set_level("DEBUG", "triton_brn")
    check(inputs(large, torch.float32, "channels_last", device=device))
    strategies = [call.plan.strategy for call in launch._calls.values() if call.view.outer == 12_800]
    assert strategies == ["two_launch"] * 2
    assert "would not run at the same time" in caplog.text


def test_fits_counts_registers_and_shared_memory(device) -> None:
    run(inputs(SHAPE, device=device), "cooperative", training=True)
    call = next(iter(launch._calls.values()))
    call.plan = replace(call.plan, slots=2, splits=2, num_warps=4)
    call.device = replace(call.device, sms=2, registers=65_536, shared=100_000)
    for registers, shared, fits in (
        (255, 0, True),
        (256, 48_000, True),
        (257, 0, False),
        (32, 49_000, False),
    ):
        compiled = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared))
        assert call.fits(compiled) == fits


def test_streams_have_workspaces_of_their_own(device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cuda":
        run(inputs(SHAPE, device=device), "cooperative", training=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            check(inputs(SHAPE, device=device), "cooperative")
    else:
        for stream in (0, 7):
            monkeypatch.setattr(launch, "current_stream", lambda index, stream=stream: stream)
            check(inputs(SHAPE, device=device), "cooperative")
    words = [t.data_ptr() for (*_, dtype), t in workspaces._buffers.items() if dtype == torch.int32]
    assert len(set(words)) == 2


def test_a_launch_that_fails_changes_nothing(device) -> None:
    case = inputs(SHAPE, device=device)
    run(case, "cooperative", training=True)
    bound = [(call.bound, key, run_) for call in launch._calls.values() for key, run_ in call.bound.items()]

    def fail(*args, **kwargs):
        raise RuntimeError("out of resources")

    for kept, key, _ in bound:
        kept[key] = fail
    case = inputs(SHAPE, device=device)
    before, step = case.running_mean.clone(), torch.tensor(7, device=device)
    with pytest.raises(RuntimeError, match="out of resources"):
        run(case, "cooperative", training=True, step=step)
    assert torch.equal(case.running_mean, before)
    assert step == 7
    for kept, key, run_ in bound:
        kept[key] = run_
    check(case, "cooperative")
    assert_nobody_waits()


def test_pointers_that_are_not_aligned_get_kernels_of_their_own(device) -> None:
    aligned = inputs(SHAPE, torch.bfloat16, device=device)
    check(aligned, "cooperative")
    shifted = inputs(SHAPE, torch.bfloat16, device=device)
    storage = torch.empty(shifted.x.numel() + 1, dtype=torch.bfloat16, device=device)
    shifted.x = storage[1:].view(SHAPE).copy_(shifted.x)
    check(shifted, "cooperative")
    assert {len(call.bound) for call in launch._calls.values()} == {2}
    other = inputs(SHAPE, torch.bfloat16, device=device)  # x is aligned again, weight is not
    other.weight = torch.cat((other.weight[:1], other.weight))[1:]
    check(other, "cooperative")
    assert {len(call.bound) for call in launch._calls.values()} == {3}


def test_saved_statistics_may_come_back_elsewhere(device) -> None:
    """saved_tensors_hooks may return them at an address of another alignment."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    check(inputs(SHAPE, device=device), "cooperative")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
        check(inputs(SHAPE, device=device), "cooperative")


def test_another_forward_between_two_launches(device) -> None:
    """Threads share a stream's workspace."""
    case = inputs(SHAPE, device=device)
    with forced_strategy("two_launch"):
        check(case)
        (call,) = (call for call in launch._calls.values() if call.direction == "forward")
        (statistics,) = (flags for flags in call.bound if flags[0][0])
        run_, between = call.bound[statistics], []

        def interrupted(*args, **kwargs):
            run_(*args, **kwargs)
            if not between:
                between.append(True)
                batch_renorm(*inputs(SHAPE, device=device, first=3).args, training=True)

        call.bound[statistics] = interrupted
        check(inputs(SHAPE, device=device))
    assert between


def test_what_the_second_launch_refuses_leaves_the_statistics(device, monkeypatch) -> None:
    """Both are compiled before the first one runs."""
    case = inputs(SHAPE, device=device)
    before = [t.clone() for t in (case.running_mean, case.running_var)]
    step, compiled = torch.tensor(7, device=device), launch.Call.compiled

    def refusing(self, kernel, arguments, flags, key):
        if not flags[0]:
            raise RuntimeError("out of resources")
        return compiled(self, kernel, arguments, flags, key)

    monkeypatch.setattr(launch.Call, "compiled", refusing)
    with pytest.raises(RuntimeError, match="out of resources"):
        run(case, "two_launch", training=True, step=step)
    assert all(map(torch.equal, before, (case.running_mean, case.running_var)))
    assert step == 7


def test_retreat_where_nothing_is_kept(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph capture."""
    monkeypatch.setattr(launch.Call, "fits", lambda self, compiled: False)
    monkeypatch.setattr(launch, "_calls", type("Forgets", (dict,), {"__setitem__": lambda *args: None})())
    check(inputs((8, 40, 40, 40), torch.float32, "channels_last", device=device))


@pytest.mark.parametrize("strategy", ["cooperative", "blocked", "two_launch"])
def test_counters_after_many_launches(strategy: str, device) -> None:
    """Ten thousand launches on a GPU; an emulator is given a hundred."""
    launches = 10_000 if device.type == "cuda" else 100
    case = inputs(SHAPE, device=device)
    step = torch.tensor(0, device=device)
    mean, var = case.running_mean.clone(), case.running_var.clone()
    with torch.no_grad(), forced_strategy(strategy):
        for _ in range(launches):
            y = batch_renorm(*case.args, training=True, num_batches_tracked=step)
    assert step == launches
    assert_nobody_waits()
    for _ in range(launches):
        expected = batch_renorm_reference(case.x, mean, var, case.weight, case.bias)
        mean, var = expected.running_mean, expected.running_var
    torch.testing.assert_close(case.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.running_var.double(), var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.double(), expected.y, rtol=1e-4, atol=1e-4)
