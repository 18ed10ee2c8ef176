"""Tuning, end to end: on the GPU, on an emulated one, or in Triton's interpreter, where a clock is faked."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import triton_brn
from triton_brn import BatchRenorm2d, candidates, planner, tuning_table, views
from triton_brn.planner import Device
from triton_brn.views import View

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
from triton_brn import search, tuned  # noqa: E402

SHAPE = (4, 3, 5, 6)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setenv("TRITON_BRN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_table, "_tables", {})
    monkeypatch.setattr(tuned, "_tried", {})
    launch.forget_calls()


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[planner.Plan]:
    """Plans in the order in which they are timed. More warps are said to be faster, and nothing runs."""
    timed: list[planner.Plan] = []

    def time(self: search.Scratch, plan: planner.Plan) -> float:
        timed.append(plan)
        return 100.0 / plan.num_warps

    monkeypatch.setattr(search.Scratch, "time", time)
    return timed


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
    with planner.forced_strategy("two_launch"):
        x = torch.empty(SHAPE, device=DEVICE)
        view = views.view_of(x.shape, x.stride())
        plan = planner.plan("forward", view, 4, launch.device_of(x))
    key = tuning_table.key("forward", "float32", view, 4)
    entry = tuning_table.Entry(candidates.choice_of(plan), 1.0, 2.0, True)
    tuning_table.save(tuned.table_name(x), {key: entry})
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
    tuning_table.path_of(tuned.table_name(torch.empty(0, device=DEVICE)), tuning_table.directory()).unlink()
    tuning_table._tables.clear()
    order = list(faked)
    faked.clear()
    assert triton_brn.tune([SHAPE, (6, 40)], device=DEVICE) == first
    assert faked == order


def test_the_budget_ends_a_search_and_the_next_run_goes_on(
    faked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(search.time, "monotonic", lambda: float(next(clock)))
    short = triton_brn.tune([SHAPE], device=DEVICE, budget=3)
    assert [(r.direction, r.finished) for r in short] == [("forward", False)]
    assert len(faked) == 2, "the planner's plan, and one more"
    whole = triton_brn.tune([SHAPE], device=DEVICE)
    assert [(r.direction, r.news, r.finished) for r in whole] == [
        ("forward", True, True),
        ("backward", True, True),
        ("inference", True, True),
    ]


def test_a_plan_that_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    default = planner.plan("forward", View(4, 3, 30), 4, launch.device_of(torch.empty(0, device=DEVICE)))

    def time(self: search.Scratch, plan: planner.Plan) -> float:
        if plan != default:
            raise RuntimeError("out of resources")
        return 1.0

    monkeypatch.setattr(search.Scratch, "time", time)
    (result,) = triton_brn.tune([SHAPE], device=DEVICE, directions=["forward"])
    assert (result.strategy, result.finished) == ("default", True)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = search.Scratch.inference
    monkeypatch.setattr(search, "benchmark", lambda run: 1.0)
    monkeypatch.setattr(
        search.Scratch, "inference", lambda self, copy, call: (right(self, copy, call)[0] + self.off, None)
    )
    scratch = search.Scratch("inference", SHAPE, (90, 30, 6, 1), torch.float32, DEVICE)
    plan = planner.plan("inference", scratch.view, 4, scratch.device)
    for scratch.off in (0.0, 1e-7):
        assert scratch.time(plan) == 1.0
    scratch.off = 1e-3
    with pytest.raises(ValueError, match="differs"):
        scratch.time(plan)


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


@pytest.mark.parametrize(
    ("error", "name", "arguments", "options"),
    [
        (ValueError, "model_or_shapes", [[(3,)]], {}),
        (ValueError, "model_or_shapes", [[(3, 0)]], {}),
        (ValueError, "model_or_shapes", [torch.nn.Linear(2, 2), torch.ones(2)], {}),
        (TypeError, "inputs", [[SHAPE], torch.ones(2)], {}),
        (TypeError, "dtype", [[SHAPE]], {"dtype": torch.int32}),
        (ValueError, "channels_last", [[(3, 4)]], {"channels_last": True}),
        (ValueError, "directions", [[SHAPE]], {"directions": ["sideways"]}),
        (ValueError, "budget", [[SHAPE]], {"budget": 0}),
    ],
)
def test_errors_name_the_argument(error, name: str, arguments: list, options: dict) -> None:
    with pytest.raises(error, match=f"^{name}:"):
        triton_brn.tune(*arguments, **options)


def test_what_plain_pytorch_serves_cannot_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "eager")
    with pytest.raises(RuntimeError, match="nothing to tune on cpu"):
        triton_brn.tune([SHAPE], device="cpu")


def test_the_command(capsys: pytest.CaptureFixture[str], faked: list) -> None:
    pytest.importorskip("tqdm")
    from triton_brn.__main__ import main

    command = ["tune", "--shape", "4,3,5,6", "--shape", "6,40", "--dtype", "fp32", "--device", str(DEVICE)]
    main(command)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 6 + 1
    assert out[1].split()[:4] == ["forward", "4x3x5x6", "float32", "contiguous"]
    assert out[-1].startswith(f"Table: {tuning_table.directory()}")
    main(command)
    assert capsys.readouterr().out.count("in the table already") == 6
    with pytest.raises(SystemExit):
        main(["tune", "--shape", "4,x"])
    assert "--shape" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="budget: expected more"):
        main(["tune", "--budget", "0"])


def test_a_missing_progress_bar_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_brn.__main__ import main

    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"pip install 'triton_brn\[tune\]'"):
        main(["tune", "--shape", "4,3", "--device", str(DEVICE)])


DEVICES = (
    Device("cuda:90", 132, 90, (3, 9), l2=50 << 20),
    Device("cuda:80", 108, 80, (3, 9), l2=40 << 20),
    Device("hip", 304, 0, (3, 9), registers=131_072, warp=64),
    Device("interpreter", 2, waits=False),
)
VIEWS = [View(*v) for v in itertools.product((1, 7, 32, 5_000), (1, 17, 96, 2048), (1, 49, 289, 1225, 3136))]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_candidates_keep_the_planners_limits(device: Device) -> None:
    numbers = random.Random(0)
    for view, itemsize, direction in itertools.product(
        VIEWS, (2, 4, 8), ("forward", "backward", "inference")
    ):
        for plan in candidates.strategies(direction, view, itemsize, device):
            choice = candidates.choice_of(plan)
            again = candidates.planned(choice, direction, view, itemsize, device)
            if not plan.waits or runs_at_once(plan, device):
                assert again == plan, "the numbers of a plan make the plan"
            if numbers.random() < 0.1:  # all of them take a minute
                for near in candidates.neighbours(plan, direction, view, itemsize, device):
                    check_plan(near, view, device)
            # What was tuned for one size serves another, or nothing.
            other = numbers.choice(VIEWS)
            moved = candidates.planned(choice, direction, other, itemsize, device)
            if moved is not None:
                check_plan(moved, other, device)


def test_tiles_on_their_way_fit_in_shared_memory() -> None:
    """A table may ask for more of them than a device holds."""
    choice = candidates.Choice("two_launch", 1024, 8, 16, 1, 64, 8, stages=4)
    view = View(64, 64, 3136)
    for shared, fits in ((101_376, False), (232_448, True)):
        device = Device("cuda", 128, 89, (3, 9), shared=shared)
        assert (candidates.planned(choice, "backward", view, 2, device) is not None) == fits


def runs_at_once(plan: planner.Plan, device: Device) -> bool:
    return plan.slots * plan.splits <= device.co_resident(plan.num_warps, plan.registers)


def check_plan(plan: planner.Plan, view: View, device: Device) -> None:
    total = views.length(view, plan.tile)
    per_split = -(-total // plan.splits)
    per_split = -(-per_split // plan.tile.grain) * plan.tile.grain
    assert (plan.splits - 1) * per_split < total <= plan.splits * per_split, "a split is empty"
    assert not plan.kept or per_split <= plan.tile.block, "a split is one tile"
    assert plan.groups * plan.tile.channels >= view.channels
    assert 1 <= plan.slots <= plan.groups
    assert plan.splits <= 65_535
    assert not plan.waits or runs_at_once(plan, device)
    for power in (plan.tile.block, plan.tile.width, plan.num_warps, plan.num_ctas, plan.tile.stages):
        assert power & (power - 1) == 0
    assert plan.tile.stages <= (1 if plan.kept else 4)
