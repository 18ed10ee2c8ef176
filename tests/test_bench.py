"""The benchmark: its inputs, and its arithmetic on known times. No time is judged."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from triton_brn import (
    _bench_budget,
    _bench_measure,
    _bench_peers,
    _bench_report,
    _bench_run,
    tuning_table,
)
from triton_brn._bench_budget import Budget, Compiling
from triton_brn._bench_cases import PRESETS, Case, default_cases, preset_shapes
from triton_brn._bench_measure import Effort
from triton_brn._bench_peers import OURS
from triton_brn._bench_plans import plans_of
from triton_brn._bench_run import Measured, rows_of

pytestmark = pytest.mark.usefixtures("eager")
CPU = torch.device("cpu")
SHORT = Effort(seconds=0, least=3, most=3)
SMALL = Case((4, 6, 5, 5))


class Clock:
    """Known times in the place of a clock: each contestant's call is a number of milliseconds."""

    def __init__(self) -> None:
        self.order: list[float] = []

    def __call__(self, call) -> float:
        self.order.append(call())
        return call() * 1e-3 * len(self.order)  # the machine slows down: ratios in a round must be taken


@pytest.mark.parametrize(("n", "number"), [(1, 1), (2, 2), (3, 6), (7, 14), (8, 8)])
def test_contestants_take_turns_so_that_each_follows_each_equally_often(n, number):
    names = list("abcdefgh"[:n])
    orders = [_bench_measure.order(names, k) for k in range(number)]
    assert all(sorted(turns) == names for turns in orders)
    before = Counter(pair for turns in orders for pair in pairwise(turns))
    assert len(before) == n * (n - 1)
    assert len(set(before.values())) <= 1
    assert {turns[0] for turns in orders} == set(names)


def test_a_round_times_each_contestant_once():
    clock, calls = Clock(), {"a": lambda: 1.0, "b": lambda: 2.0, "c": lambda: 4.0}
    times = _bench_measure.rounds(calls, clock, SHORT)
    assert clock.order == [1, 2, 4, 2, 4, 1, 4, 1, 2]
    assert times["a"] == pytest.approx([1e-3, 6e-3, 8e-3])


def test_rounds_end_with_the_effort():
    count = {
        n: len(_bench_measure.rounds({"a": lambda: 1.0}, Clock(), e)["a"])
        for n, e in {
            "time is up": Effort(seconds=0, least=2, most=9),
            "enough": Effort(seconds=60, least=2, most=9),
        }.items()
    }
    assert count == {"time is up": 2, "enough": 9}
    assert _bench_measure.rounds({}, Clock(), SHORT) == {}


def test_quantiles_are_numpys():
    values = [5.0, 1.0, 4.0, 2.0]
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert _bench_measure.quantile(values, q) == pytest.approx(torch.tensor(values).quantile(q).item())
    assert _bench_measure.quantile([3.0], 0.2) == 3.0


def test_numbers_have_three_digits_and_no_exponent():
    values = (None, 0.0, 0.00402, 0.5, 1.0, 12.345, 99.96, 1234.5)
    shown = ["-", "0.00", "0.00402", "0.500", "1.00", "12.3", "100.0", "1,234"]
    assert [_bench_report.number(value) for value in values] == shown


def test_rows_are_computed_from_the_times():
    measured = Measured(
        times={OURS: [1e-3, 2e-3, 4e-3], "BatchNorm": [2e-3, 6e-3, 8e-3]},
        graph={OURS: [1e-3, 1e-3, 1e-3]},
        wall={OURS: [3e-3]},
        peak={OURS: 7.5},
        launches={OURS: 1},
        notes={"BatchNorm": "no CUDA graph: for a reason", "torchrl": "left out"},
        packages={"BatchNorm": "a package 1.2"},
    )
    case = Case((2, 5, 10, 10), "bf16")
    plans = [("resident", "planner"), ("blocked", "tuned"), ("resident", "planner")]
    ours, norm, absent = rows_of(case, "backward", plans, measured, 10.0, {"device": "a device"})
    ideal = 3 * 2 * 1000  # x, dy and dx in two bytes
    assert (ours.ms, norm.ms) == (2, 6)
    assert (ours.ms_q20, ours.ms_q80) == pytest.approx((1.4, 3.2))
    assert ours.ideal_mb == ideal / 1e6
    assert ours.gbps == pytest.approx(ideal / 2e-3 / 1e9)
    assert ours.copy_percent == pytest.approx(100 * ours.gbps / 10)
    assert ours.best_gbps == ours.graph_gbps == pytest.approx(2 * ours.gbps)
    assert (ours.speedup, norm.speedup) == (1, 2)  # median of 2, 3 and 2
    assert (ours.wall_ms, ours.peak_mib, ours.launches) == (3, 7.5, 1)
    assert norm.graph_ms is None
    assert "no CUDA graph" in norm.note
    assert (absent.peer, absent.ms, absent.speedup, absent.note) == ("torchrl", None, None, "left out")
    assert {row.device for row in (ours, norm, absent)} == {"a device"}
    assert {row.strategy for row in (ours, norm, absent)} == {"resident + blocked"}
    assert {row.planned_by for row in (ours, norm, absent)} == {"planner + tuned"}
    assert [row.package for row in (ours, norm, absent)] == ["", "a package 1.2", ""]
    assert _bench_report.plan_of(ours) == "resident + blocked (planner + tuned)"
    assert "a package 1.2" in _bench_report.heading([ours, norm, absent])


@pytest.mark.parametrize(
    ("direction", "tensors"), [("forward", 2), ("backward", 3), ("both", 5), ("inference", 2)]
)
def test_ideal_bytes_count_each_tensor_once(direction, tensors):
    assert Case((2, 3, 4), "fp16").ideal_bytes(direction) == tensors * 24 * 2


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "default"])
def test_presets_hold_shapes_that_layers_take(preset):
    for shape in preset_shapes(preset, (4, 32)):
        assert _bench_peers.batch_renorm(shape).num_features == _bench_peers.batch_norm(shape).num_features
    assert len(set(preset_shapes(preset, (4, 32)))) == len(preset_shapes(preset, (4, 32)))


def test_the_default_has_both_layouts_odd_maps_and_a_family_of_sizes():
    cases = default_cases("fp32", large=False, quick=False)
    assert {case.layout for case in cases} == {"contiguous", "channels_last"}
    assert any(case.shape[-1] % 2 for case in cases)
    assert len({case.shape[0] for case in cases if case.shape[1:] == (64, 56, 56)}) >= 3


def test_inputs_are_the_same_each_time_in_the_layout_asked_for():
    case = Case((2, 6, 5, 5), "bf16", "channels_last")
    x, dy = case.tensors(CPU)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.bfloat16
    assert x.requires_grad
    assert torch.equal(x, case.tensors(CPU)[0])


def test_what_a_contestant_cannot_do_is_noted(monkeypatch):
    def broken(shape):
        raise RuntimeError("out of luck\nand more")

    some = [
        _bench_peers.Peer(OURS, _bench_peers.batch_renorm),
        _bench_peers.Peer("broken", broken),
        _bench_peers.Peer("absent", broken, package="no_such_package"),
        _bench_peers.Peer("slow", broken, compiled=True),
    ]
    monkeypatch.setattr(_bench_run, "peers", lambda kind: some)
    found, notes = _bench_run.contestants(SMALL, SMALL.tensors(CPU), ["both"], Compiling(0))
    assert list(found) == [OURS]
    assert notes == {
        "broken": "failed: RuntimeError: out of luck",
        "absent": "left out: pip install no-such-package",
        "slow": "not compiled: --compile-seconds 0",
    }


def test_compiling_ends_when_its_seconds_are_used_up():
    compiling = Compiling(5)
    assert not compiling.refusal
    compiling.spent = 6
    assert compiling.refusal == "not compiled: --compile-seconds 5 were used up"


def test_a_budget_is_shared_by_what_is_left_to_measure(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_bench_budget, "perf_counter", lambda: now[0])
    budget = Budget(Effort(seconds=2, least=3), directions=4, seconds=10, compile_seconds=4)
    assert budget.next_effort(1) == Effort(seconds=1.5, least=3)  # (10 - 4) / 4
    now[0] += 1.5
    assert budget.next_effort(3).seconds == pytest.approx(0.5)  # each of three timers
    with budget.compiling.counted():
        now[0] += 4  # as reserved, and what was measured took no time: the rest of 4.5 s is for two
    assert budget.next_effort(1).seconds == pytest.approx(2)
    now[0] += 60
    assert budget.next_effort(1) == Effort(seconds=0, least=3)
    assert (
        Budget(Effort(seconds=2), directions=4, seconds=None, compile_seconds=4).next_effort(1).seconds == 2
    )


def test_rows_say_which_code_ran(monkeypatch):
    some = [
        _bench_peers.Peer(OURS, _bench_peers.batch_renorm),
        _bench_peers.Peer("pytest", _bench_peers.batch_norm, package="pytest"),
    ]
    monkeypatch.setattr(_bench_run, "peers", lambda kind: some)
    monkeypatch.setattr(_bench_run, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(_bench_run, "plans_of", lambda x, direction: [("cluster", "tuned")])
    bar = SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)
    (rows,) = _bench_run.measure(SMALL, ["both"], CPU, Budget(SHORT, 1, None, 0), bar)
    assert [row.package for row in rows] == ["", f"pytest {pytest.__version__}"]
    assert {(row.strategy, row.planned_by) for row in rows} == {("cluster", "tuned")}


def test_the_plans_are_those_that_run(monkeypatch):
    x = torch.randn(4, 8)
    assert plans_of(x, "both") == [("eager", "")]
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    assert plans_of(x, "both") == [("resident", "planner")] * 2
    assert plans_of(x, "inference") == [("two_launch", "planner")]


def test_a_tuned_plan_and_a_retreat_are_told_from_the_planners(monkeypatch, request):
    launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")
    request.addfinalizer(launch.forget_calls)
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    x = torch.randn(4, 8)
    call = launch.prepared("forward", x, torch.float32)[1]
    call = call.retreated(x, torch.float32)
    assert plans_of(x, "both") == [("two_launch", "retreat"), ("resident", "planner")]
    view = launch.view_of(x.shape, x.stride())
    entry = tuning_table.Entry(call.plan.choice, 1.0, 2.0, True, view)
    monkeypatch.setattr(tuning_table, "look_up", lambda name, key: entry)
    launch.forget_calls()
    assert plans_of(x, "forward") == [("two_launch", "tuned")]


class Event:
    """A device event on a device whose clock each record moves by a millisecond."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        Event.now += 1
        self.time = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


def test_on_cuda_events_graphs_memory_and_launches_are_taken(monkeypatch):
    """With a stand-in for torch.cuda: which calls are made, not what they do."""
    replayed = []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    stands_in = {
        "Event": Event,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, stream: nullcontext(),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 3 << 20,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    work = [
        SimpleNamespace(device_type="DeviceType.CUDA", is_user_annotation=span)
        for span in (False, False, True)
    ]
    work.append(SimpleNamespace(device_type="DeviceType.CPU", is_user_annotation=False))
    profiler = SimpleNamespace(events=lambda: work)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profiler))
    monkeypatch.setattr(_bench_measure, "COPY_BYTES", 1 << 10)

    x, dy = SMALL.tensors(CPU)
    asks = _bench_peers.Peer("asks", _bench_peers.batch_norm, waits_for_host=True)
    layers = {
        OURS: (_bench_peers.Peer(OURS, _bench_peers.batch_renorm), _bench_peers.batch_renorm(SMALL.shape))
    }
    layers["asks"] = (asks, _bench_peers.batch_norm(SMALL.shape))
    measured = _bench_run.measure_cuda(layers, x, dy, "both", SHORT)
    assert measured.times == {OURS: [1e-3] * 3, "asks": [1e-3] * 3}
    assert measured.graph == {OURS: [1e-3] * 3}
    assert len(replayed) == 3
    assert set(measured.wall) == {OURS, "asks"}
    assert measured.peak == {OURS: 2.0, "asks": 2.0}
    assert measured.launches == {OURS: 2, "asks": 2}
    assert measured.notes == {"asks": "no CUDA graph: it waits for the device"}
