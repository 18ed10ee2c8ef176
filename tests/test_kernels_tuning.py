"""Tuning, end to end: on the GPU, on an emulated one, or in Triton's interpreter, where a clock is faked."""

from __future__ import annotations

import dataclasses
import itertools
import types
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import triton_brn
from triton_brn import BatchRenorm2d, candidates, planner, plans, tuning_table, views
from triton_brn.info import info
from triton_brn.plans import Device
from triton_brn.views import View

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
from triton_brn import devices, search, tuned  # noqa: E402

SHAPE = (4, 3, 5, 6)


@pytest.fixture(autouse=True)
def _fresh(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(tuned, "_tried", {})
    launch.forget_calls()


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[plans.Plan]:
    """Plans in the order in which they are timed. More warps are said to be faster, and nothing runs."""
    timed: list[plans.Plan] = []

    def time(self: search.Scratch, plan: plans.Plan, refuse: bool = True) -> float:
        timed.append(plan)
        return 100.0 / plan.num_warps

    monkeypatch.setattr(search.Scratch, "time", time)
    return timed


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search's clock moves by a second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(search.time, "monotonic", lambda: float(next(clock)))


def layer() -> BatchRenorm2d:
    torch.manual_seed(0)
    module = BatchRenorm2d(3, momentum=0.1, r_max=2.0, d_max=0.5).to(DEVICE)
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2.0)
    return module


def trained(module: BatchRenorm2d) -> list[torch.Tensor]:
    """All that a training step leaves behind."""
    torch.manual_seed(1)
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    tensors = [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers(), torch.rand(3)]
    return [t.detach().clone() for t in tensors]


def save_two_launch() -> plans.Plan:
    """Have the table say that SHAPE's forward takes two launches."""
    x = torch.empty(SHAPE, device=DEVICE)
    view = views.view_of(x.shape, x.stride())
    plan = planner.plan("forward", view, 4, device(), "two_launch")
    name, key = tuned.place("forward", view, x)
    tuning_table.save(name, {key: tuning_table.Entry(plan.choice, 1.0, 2.0, True, view)})
    return plan


def device() -> Device:
    return launch.device_of(torch.empty(0, device=DEVICE))


def forget_tables() -> None:
    """As if nothing had been tuned."""
    tuning_table.path_of(tuned.table_name(torch.empty(0, device=DEVICE)), tuning_table.directory()).unlink()
    tuning_table._tables.clear()


def test_tuning_runs_and_resumes() -> None:
    first = triton_brn.tune([SHAPE], device=DEVICE)
    assert [result.direction for result in first] == ["forward", "backward", "inference"]
    for result in first:
        assert result.news
        assert result.finished
        assert 0 < result.us <= result.default_us
        assert (result.strategy == "default") == (result.us == result.default_us)
    again = triton_brn.tune([SHAPE, SHAPE], device=DEVICE)
    assert [(r.us, r.strategy, r.news) for r in again] == [(r.us, r.strategy, False) for r in first]


def test_a_tuned_plan_is_used_and_right() -> None:
    before = trained(layer())
    plan = save_two_launch()
    launch.forget_calls()
    after = trained(layer())
    used = [call.plan for call in launch._calls.values() if call.direction == "forward"]
    assert used == [plan]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_models_keep_their_statistics_and_random_numbers(faked: list) -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), layer(), torch.nn.Conv2d(3, 3, 1).to(DEVICE), layer())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(SHAPE, device=DEVICE).to(memory_format=torch.channels_last)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    results = triton_brn.tune(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert {(r.shape, r.layout, r.dtype) for r in results} == {(SHAPE, "channels_last", "float32")}
    assert len(results) == 3, "both layers are of one size"
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_results_are_deterministic(faked: list) -> None:
    first = triton_brn.tune([SHAPE, (6, 40)], device=DEVICE)
    forget_tables()
    order = list(faked)
    faked.clear()
    assert triton_brn.tune([SHAPE, (6, 40)], device=DEVICE) == first
    assert faked == order


def test_the_budget_ends_a_search_and_the_next_run_goes_on(faked: list, ticking: None) -> None:
    short = triton_brn.tune([SHAPE], device=DEVICE, budget=3)
    assert [(r.direction, r.finished) for r in short] == [("forward", False)]
    assert len(faked) == 2, "the planner's plan, and one more"
    whole = triton_brn.tune([SHAPE], device=DEVICE)
    assert [(r.direction, r.news, r.finished) for r in whole] == [
        ("forward", True, True),
        ("backward", True, True),
        ("inference", True, True),
    ]


def test_what_was_tried_is_not_tried_again(faked: list, ticking: None) -> None:
    whole = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    order = list(faked)
    forget_tables()
    timed: list[plans.Plan] = []
    for _ in range(len(order)):
        faked.clear()
        (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"], budget=3)
        timed += faked[1:]  # the planner's plan is the measure each time
        tuning_table._tables.clear()  # a new process
        if result.finished:
            break
        assert len(faked) == 2
    assert timed == order[1:]
    assert [result] == whole


def test_other_sizes_of_a_bucket_are_timed(faked: list) -> None:
    """What a plan gains is said of the shape that was asked for."""
    triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    faked.clear()
    (same,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert not faked, "the table has it"
    (near,) = triton_brn.tune([(5, 3, 2, 11)], device=DEVICE, directions=["forward"])
    assert not near.news
    assert near.strategy == same.strategy != "default"
    default, chosen = faked
    assert default == planner.plan("forward", View(5, 3, 22), 4, device())
    assert (near.default_us, near.us) == (100 / default.num_warps, 100 / chosen.num_warps)


def test_a_search_goes_on_for_the_size_that_began_it(faked: list, ticking: None) -> None:
    """Two sizes of a bucket share a search, and neither undoes what the other has tried."""
    whole = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    forget_tables()
    triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"], budget=3)
    (near,) = triton_brn.tune([(3, 3, 5, 6)], device=DEVICE, directions=["forward"], budget=1e6)
    (same,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert near.finished
    assert same == dataclasses.replace(whole[0], news=False)


def test_another_clock_rate_changes_no_choice(faked: list, ticking: None, monkeypatch) -> None:
    """What an earlier run measured is compared with what it measured of the planner's plan."""
    fake, slower = search.Scratch.time, 1.0

    def time(self: search.Scratch, plan: plans.Plan, refuse: bool = True) -> float:
        fake(self, plan, refuse)
        return 100.0 * slower

    monkeypatch.setattr(search.Scratch, "time", time)
    triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"], budget=3)
    slower = 1.5
    (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert result.finished
    assert result.strategy == "default"


def test_a_models_inputs_are_cloned_and_its_forward_tunes_nothing(
    faked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", "1")
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), layer())
    x = torch.randn(SHAPE, device=DEVICE)
    before = x.clone()
    assert triton_brn.tune(model, x, budget=1e-9) == []
    assert not faked
    assert torch.equal(x, before)


def test_a_plan_that_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    default = planner.plan("forward", View(4, 3, 30), 4, device())

    def time(self: search.Scratch, plan: plans.Plan, refuse: bool = True) -> float:
        if plan != default:
            raise RuntimeError("out of resources")
        return 1.0

    monkeypatch.setattr(search.Scratch, "time", time)
    (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert (result.strategy, result.finished) == ("default", True)


def test_a_default_that_does_not_fit_retreats_as_a_call_does(faked: list, monkeypatch) -> None:
    fake = search.Scratch.time

    def time(self: search.Scratch, plan: plans.Plan, refuse: bool = True) -> float:
        if plan.strategy != "two_launch":
            raise launch.DoesNotFit("too many programs")
        return fake(self, plan, refuse)

    monkeypatch.setattr(search.Scratch, "time", time)
    (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert result.default_us > 0
    assert result.finished


def test_autotune_warns_of_whatever_goes_wrong(faked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(self: search.Scratch, plan: plans.Plan, refuse: bool = True) -> float:
        raise AssertionError("a compiler's")

    expected = trained(layer())
    launch.forget_calls()
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", "1")
    monkeypatch.setattr(search.Scratch, "time", time)
    with pytest.warns(UserWarning, match="was not tuned: a compiler's"):
        actual = trained(layer())
    assert all(map(torch.equal, actual, expected))


def test_autotune_is_once_per_key_and_changes_nothing(faked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(layer())
    launch.forget_calls()
    assert not faked, "nothing is tuned unless asked for"
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", "1")
    monkeypatch.setattr(candidates, "strategies", lambda *call: [])  # the planner's plan only: the same bits
    monkeypatch.setattr(candidates, "neighbours", lambda *call: [])
    for _ in range(2):
        for actual, e in zip(trained(layer()), expected, strict=True):
            assert torch.equal(actual, e)
    assert len(faked) == 2, "forward and backward"
    launch.forget_calls()
    tuning_table._tables.clear()  # a new process
    trained(layer())
    assert len(faked) == 2


@pytest.mark.filterwarnings("ignore:tuning table")
def test_autotune_survives_a_table_that_cannot_be_written(
    faked: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", "1")
    monkeypatch.setenv("TRITON_BRN_CACHE_DIR", "/dev/null/here")
    module = layer().eval()
    x = torch.randn(SHAPE, device=DEVICE)
    with pytest.warns(UserWarning, match="was not stored"), torch.inference_mode():
        module(x)
    tried = len(faked)
    launch.forget_calls()
    module(x)
    assert 0 < len(faked) == tried


def test_nothing_is_tuned_while_a_graph_is_captured(faked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_AUTOTUNE", "1")
    monkeypatch.setattr(tuned, "capturing", lambda x: True)
    trained(layer())
    assert not faked


def test_a_capture_is_seen_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert devices.capturing(types.SimpleNamespace(is_cuda=True))
    assert not devices.capturing(types.SimpleNamespace(is_cuda=False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not devices.capturing(types.SimpleNamespace(is_cuda=True))


def test_tables_are_asked_at_the_first_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    look_up = tuning_table.look_up
    monkeypatch.setattr(tuning_table, "look_up", lambda *key: asked.append(key[1]) or look_up(*key))
    for _ in range(3):
        trained(layer())
    assert [key.split("/")[0] for key in asked] == ["forward", "backward"]


def test_info_says_what_was_tuned() -> None:
    assert "tuned" not in info(SHAPE)
    save_two_launch()
    assert "  forward    tuned, two_launch: 2 launches" in info(SHAPE)
