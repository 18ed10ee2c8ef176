"""How plans are timed and held against each other: on the GPU, an emulated one, or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from triton_brn import planner, plans
from triton_brn.tuning import Size

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
from triton_brn import search  # noqa: E402

SIZE = Size((4, 3, 5, 6), (90, 30, 6, 1), torch.float32, DEVICE)


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(search, "benchmark", lambda run: 1.0)


WRONG = [("forward", i) for i in range(5)] + [("backward", i) for i in range(3)] + [("inference", 0)]


@pytest.mark.parametrize(("direction", "wrong"), WRONG)
def test_a_wrong_result_is_not_timed(direction: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them: y, saved, and the running statistics; dx, dweight and dbias; y."""
    right = search.Scratch.results
    off = 0.0

    def results(self: search.Scratch, call: launch.Call) -> list[torch.Tensor]:
        found = right(self, call)
        found[wrong] = found[wrong] + torch.tensor(off).to(found[wrong].dtype)
        return found

    monkeypatch.setattr(search.Scratch, "results", results)
    scratch = search.Scratch(direction, SIZE)
    plan = planner.plan(*scratch.call)
    assert scratch.time(plan) == 1.0
    off = 1e-7
    assert scratch.time(plan) == 1.0
    off = 1.0
    with pytest.raises(ValueError, match="differ"):
        scratch.time(plan)


def test_trials_begin_alike_and_clip_some_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "benchmark", lambda run: [run() for _ in range(3)] and 1.0)
    scratch = search.Scratch("forward", Size((4, 24, 5, 6), (720, 30, 6, 1), torch.float32, DEVICE))
    for strategy in ("resident", "two_launch"):
        assert scratch.time(planner.plan(*scratch.call, strategy)) == 1.0
    r, d = scratch.expected[1][3:]
    for values, most in ((r, 1.25), (d, 0.5)):
        clipped = int((values == most).sum())
        assert 0 < clipped < len(values)


def test_a_plan_that_spills_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = search.Scratch("forward", SIZE)
    plan = planner.plan(*scratch.call)
    given = scratch.given

    def spilling(plan: plans.Plan, direction: str) -> launch.Call:
        call = given(plan, direction)
        call.spills = 3
        return call

    monkeypatch.setattr(scratch, "given", spilling)
    assert scratch.time(plan) == 1.0, "the planner's own is the measure of others"
    with pytest.raises(ValueError, match="spills 3"):
        scratch.time(plan)


def test_copies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[search.Copy] = []
    original = search.Scratch.inference

    def inference(self: search.Scratch, copy: search.Copy, call: launch.Call) -> tuple[torch.Tensor, ...]:
        used.append(copy)
        return original(self, copy, call)

    monkeypatch.setattr(search.Scratch, "inference", inference)
    monkeypatch.setattr(search, "benchmark", lambda run: [run() for _ in range(4)] and 1.0)
    scratch = search.Scratch("inference", SIZE)
    scratch.copies = [search.Copy(scratch.x.clone(), scratch.x) for _ in range(3)]
    scratch.time(planner.plan(*scratch.call))
    turns = [[copy is one for one in scratch.copies].index(True) for copy in used[-4:]]
    assert turns == [1, 2, 0, 1]
