"""The benchmark's command: its files and its errors, and whole networks. No time is judged."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

from triton_brn import (
    _bench_budget,
    _bench_measure,
    _bench_models,
    _bench_peers,
    _bench_report,
    _bench_run,
    benchmark,
    progress,
)
from triton_brn.__main__ import main
from triton_brn._bench_cases import DIRECTIONS, RESNET50, Case
from triton_brn._bench_measure import Effort
from triton_brn._bench_peers import OURS

pytestmark = pytest.mark.usefixtures("eager")
SHORT = Effort(seconds=0, least=3, most=3)
LIGHT = (OURS, "BatchNorm", "plain PyTorch")  # neither compiled nor of a package that takes seconds to import


@pytest.fixture
def complete() -> None:
    """Only where the command's packages are installed."""
    if missing := progress.missing(benchmark.EXTRAS):
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few contestants, few rounds, small buffers, and a short run of the command."""
    monkeypatch.setattr(
        _bench_run, "peers", lambda kind: [p for p in _bench_peers.peers(kind) if p.name in LIGHT]
    )
    monkeypatch.setattr(_bench_measure, "QUICK", SHORT)
    monkeypatch.setattr(_bench_measure, "COPY_BYTES", 1 << 16)
    _bench_measure.copy_bandwidth.cache_clear()


@pytest.mark.usefixtures("complete", "light")
def test_the_command_writes_complete_tables_and_figures(tmp_path, capsys):
    shapes = ["4,6,5,5", "8,6", "16,6"]
    main(["bench", "--quick", "--shape", *shapes, "--direction", *DIRECTIONS, "--out", str(tmp_path)])
    shown, about = capsys.readouterr()
    assert "3 inputs, 4 directions on cpu: about 5 s" in about
    assert "4x6x5x5 fp32" in shown
    records = json.loads((tmp_path / "layers.json").read_text())
    with (tmp_path / "layers.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(records) == 3 * len(DIRECTIONS) * len(LIGHT)
    assert list(table[0]) == [field.name for field in dataclasses.fields(_bench_run.Row)]
    for record in records:
        assert record["ms_q20"] <= record["ms"] <= record["ms_q80"]
        assert record["gbps"] == pytest.approx(record["ideal_mb"] / record["ms"])
        assert all(
            record[k] for k in ("device", "python", "torch", "triton", "triton_brn", "strategy", "speedup")
        )
    for name in ("speedup", "bandwidth", "scaling"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("complete", "light")
def test_one_direction_in_channels_last(tmp_path):
    arguments = [
        "--shape",
        "2,6,5,5",
        "--channels-last",
        "--direction",
        "inference",
        "--dtype",
        "bf16",
        "fp32",
    ]
    main(["bench", "--quick", *arguments, "--out", str(tmp_path)])
    records = json.loads((tmp_path / "layers.json").read_text())
    assert {(r["layout"], r["direction"]) for r in records} == {("channels_last", "inference")}
    assert {r["dtype"] for r in records} == {"bf16", "fp32"}


@pytest.mark.usefixtures("complete", "light")
def test_a_run_that_is_interrupted_prints_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    measure, out = _bench_run.measure_cpu, tmp_path / "of" / "its own"

    def interrupted(layers, x, dy, direction, effort):
        if direction == "both":
            assert (out / "layers.csv").read_text().count("\n") == 1 + len(LIGHT)  # written when measured
            raise KeyboardInterrupt
        return measure(layers, x, dy, direction, effort)

    monkeypatch.setattr(_bench_run, "measure_cpu", interrupted)
    command = ["bench", "--quick", "--shape", "4,6", "--out", str(out), "--direction"]
    main([*command, "forward", "both"])
    assert "4x6 fp32" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "bandwidth.png",
        "layers.csv",
        "layers.json",
        "speedup.png",  # no scaling.png: it would have one point
    ]
    with pytest.raises(SystemExit, match=r"^bench: interrupted, nothing was measured$"):
        main([*command, "both"])


@pytest.mark.usefixtures("complete", "light")
@pytest.mark.parametrize("why", ["spread", "busy machine"])
def test_times_that_are_not_to_be_trusted_are_marked(why, tmp_path, monkeypatch, capsys):
    spread = {"spread": 0.0, "busy machine": float("inf")}[why]
    monkeypatch.setattr(_bench_run, "WIDE_SPREAD", spread)
    monkeypatch.setattr("os.getloadavg", lambda: (20.0 if why == "busy machine" else 0.0, 0, 0))
    main(["bench", "--quick", "--shape", "4,6", "--direction", "forward", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "layers.json").read_text())
    assert all(row["unsteady"].startswith(why) for row in rows)
    shown = capsys.readouterr().out
    assert "?: a spread (20 to 80 %) above a quarter of the median, or a busy machine" in shown
    assert all(f"{_bench_report.number(row['ms'])}?" in shown for row in rows if row["peer"] == OURS)


@pytest.mark.usefixtures("complete", "light")
def test_an_input_that_nobody_takes_is_reported(tmp_path, capsys):
    main(["bench", "--quick", "--shape", "1,6", "--direction", "forward", "--out", str(tmp_path)])
    assert "BatchNorm: failed: ValueError: Expected more than 1 value per channel" in capsys.readouterr().out
    assert (tmp_path / "layers.csv").is_file()


@pytest.mark.usefixtures("complete", "light")
@pytest.mark.parametrize(("seconds", "least", "most"), [(5.0, 4.5, 5.5), (None, 8.5, 9.5)])
def test_a_run_keeps_to_its_seconds(tmp_path, monkeypatch, seconds, least, most):
    readings = itertools.count()

    def now():  # each reading of the clock takes 10 ms
        return next(readings) / 100

    for module in (_bench_budget, _bench_measure):
        monkeypatch.setattr(module, "perf_counter", now)
    cases = [Case((4, 6)), Case((8, 6))]
    benchmark.run_bench(
        cases, directions=("forward", "both"), out=tmp_path, seconds=seconds, compile_seconds=0
    )
    assert least < now() < most  # unlimited: four times 2 s and a copy's second


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (150, 45)),
        (["--preset", "default"], (150, 45)),
        (["--quick"], (150, 0)),
        (["--preset", "odd"], (None, 45)),
        (["--shape", "4,5"], (None, 45)),
        (["--shape", "4,5", "--seconds", "20"], (20, 6)),
        (["--seconds", "300", "--compile-seconds", "100"], (300, 100)),
    ],
)
def test_the_default_inputs_have_a_limit(monkeypatch, arguments, expected):
    found = []
    monkeypatch.setattr(benchmark, "EXTRAS", ())
    monkeypatch.setattr(
        benchmark,
        "run_bench",
        lambda cases, **options: found.append((options["seconds"], options["compile_seconds"])),
    )
    main(["bench", *arguments])
    assert found == [expected]


@pytest.mark.usefixtures("complete")
def test_whole_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(_bench_models.DEPTHS, "resnet18", ((1,), False))
    monkeypatch.setattr(_bench_models, "QUICK", SHORT)
    main(["bench", "--model", "resnet18", "--quick", "--batch", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "resnet18.json").read_text())
    assert [row["peer"] for row in rows] == list(_bench_models.VARIANTS)
    assert all((row["strategies"], row["planned_by"]) == ("eager", "") for row in rows)
    assert all(row["images_per_second"] == pytest.approx(2e3 / row["ms"]) for row in rows)
    assert "training step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters", "norms"), [("resnet18", 11_689_512, 20), ("resnet50", 25_557_032, 53)]
)
def test_models_are_resnets(name, parameters, norms):
    with torch.device("meta"):
        model = _bench_models.resnet(name)
        assert sum(p.numel() for p in model.parameters()) == parameters  # as published
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == norms
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
        plain = _bench_models.with_plain(model)
    assert sum(isinstance(m, _bench_peers.EagerBatchRenorm) for m in plain.modules()) == norms


def test_the_plans_of_a_model_are_those_of_its_layers(monkeypatch):
    seen = iter((("resident", "planner"), ("cluster", "planner"), ("resident", "tuned")))
    monkeypatch.setattr(_bench_models, "plans_of", lambda x, direction: [next(seen)])
    model = nn.Sequential(*(_bench_peers.batch_renorm((2, 6, 5, 5)) for _ in range(3)))
    steps = []

    def step():
        steps.append(model(torch.randn(2, 6, 5, 5)))

    plans = _bench_models.plans_in(model, step)
    assert plans == [("resident", "planner"), ("cluster", "planner"), ("resident", "tuned")]
    step()  # hooks are gone
    assert len(steps) == 2


def test_the_resnet50_preset_holds_every_batch_normalisation():
    found = []
    with torch.device("meta"):
        model = _bench_models.resnet("resnet50")
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda layer, args, y: found.append(tuple(y.shape[1:3])))
        model(torch.empty(1, 3, 224, 224))
    assert tuple(dict.fromkeys(found)) == RESNET50


def test_a_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(benchmark, "EXTRAS", ("no_such_package",))
    with pytest.raises(
        SystemExit,
        match=r"^bench needs no_such_package: pip install 'triton_brn\[bench\]', in a .* '\.\[bench\]'",
    ):
        main(["bench"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3"], "argument --shape: expected 2 to 5 sizes above 0 as in 32,64,56,56, got '3'"),
        (["--shape", "4,0,2"], "argument --shape: expected"),
        (["--shape", "4,five"], "argument --shape: expected"),
        (["--shape", "4,5", "--preset", "odd"], "argument --preset: not allowed with argument --shape"),
        (["--shape", "4,5", "--channels-last"], "argument --channels-last: expected shapes of 4 or 5 sizes"),
        (["--batch", "4"], "argument --batch: goes with --model or --preset resnet50, inception, odd"),
        (["--preset", "odd", "--batch", "0"], "argument --batch: expected at least 1, got 0"),
        (["--compile-seconds", "-1"], "argument --compile-seconds: expected at least 0, got -1"),
        (["--seconds", "-1"], "argument --seconds: expected at least 0, got -1"),
        (["--seconds", "nan"], "argument --seconds: expected at least 0, got nan"),
        (["--seconds", "ten"], "argument --seconds: invalid float value: 'ten'"),
        (
            ["--seconds", "9", "--compile-seconds", "10"],
            "argument --compile-seconds: expected at most --seconds 9, got 10",
        ),
        (["--model", "resnet18", "--seconds", "9"], "argument --seconds: not allowed with argument --model"),
        (["--device", "no"], "argument --device"),
        (["--shape", "4,5", "--out", __file__], "argument --out: [Errno 17]"),
        (["--device", "meta"], "argument --device: expected cpu or cuda, got meta"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--model", "resnet18", "--dtype", "bf16"], "argument --dtype: not allowed with argument --model"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "EXTRAS", ())
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err
