"""The demo's pieces and the command line."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import triton_brn
from triton_brn import BatchRenorm2d, progress
from triton_brn.__main__ import main

pytestmark = pytest.mark.usefixtures("eager")
METHODS = ("BN", "BRN")


@pytest.fixture
def demo():
    """The demo, where its packages are installed."""
    from triton_brn import demo

    if missing := progress.missing(demo.EXTRAS):
        pytest.skip(f"needs {', '.join(missing)}")
    return demo


@pytest.fixture
def training(demo):
    """What the demo trains."""
    from triton_brn import _demo_train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the demo's own processes
    yield _demo_train
    torch.set_num_threads(threads)


def test_every_class_has_400_images_to_learn_from_and_100_held_out(training):
    data = training.load()
    assert data.images.shape == (4000, 1, 28, 28)
    assert torch.bincount(data.labels).tolist() == [400] * 10
    assert torch.bincount(data.held_out_labels).tolist() == [100] * 10
    assert abs(data.images.mean()) < 1e-4
    assert abs(data.images.std() - 1) < 1e-4


def test_groups_hold_one_class_where_the_setting_says_so(training):
    labels = training.load().labels
    classes = training.classes_of(labels)
    for setting in training.SETTINGS:
        batch = training.draw_batch(setting, classes, torch.Generator().manual_seed(0))
        groups = labels[batch].view(-1, setting.group)
        assert groups.numel() == training.BATCH
        assert all(len(group.unique()) == 1 for group in groups) == setting.one_class


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchRenorm2d])
def test_each_group_is_a_minibatch_of_its_own(kind, training):
    grouped, alone = training.PerGroup(kind(3), 4), kind(3)
    x = torch.randn(12, 3, 5, 5)
    assert torch.equal(grouped(x), torch.cat([alone(x[:4]), alone(x[4:8]), alone(x[8:])]))
    assert grouped.norm.num_batches_tracked == 3
    assert torch.equal(grouped.norm.running_var, alone.running_var)
    assert torch.equal(grouped.eval()(x), alone.eval()(x))


def test_both_methods_start_alike_and_average_over_as_many_images(training):
    models = {}
    for method in METHODS:
        torch.manual_seed(0)
        models[method] = training.network(method, 4, 100)
    for a, b in zip(*(model.parameters() for model in models.values()), strict=True):
        assert torch.equal(a, b)
    norms = [[m for m in model if isinstance(m, training.PerGroup)] for model in models.values()]
    assert {layer.norm.momentum for layers in norms for layer in layers} == {0.01}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_can_be_repeated(method, training):
    run = training.Run(training.SETTINGS[0], method, seed=0, steps=40)
    first = training.train(run)
    assert len(first) == len(training.evaluation_steps(40)) == 2
    assert first[-1] > 30
    assert training.train(run) == first


def test_processes_table_and_figure(demo, training, tmp_path, capsys):
    from triton_brn._demo_plot import draw

    runs = [training.Run(s, m, seed, steps=2) for s in training.SETTINGS for m in METHODS for seed in (0, 1)]
    curves = demo.train_all(runs, processes=1)
    assert set(curves) == set(runs)
    shown = demo.table(curves)
    assert all(setting.title in shown for setting in training.SETTINGS)
    assert "2 seeds" in shown
    draw(curves, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_says_how_long_it_takes_and_ends_in_one_line_when_interrupted(
    demo, training, tmp_path, monkeypatch, capsys
):
    def interrupted(runs, processes):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_all", interrupted)
    with pytest.raises(SystemExit, match=r"^demo: interrupted, nothing was drawn$"):
        main(["demo", "--quick", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("6 runs of 250 steps on cpu, ")
    assert re.fullmatch(r"This takes about \d+ (s|minutes)", second)


@pytest.mark.parametrize("out", ["figure.txt", "file.png/figure.png"])
def test_a_figure_that_cannot_be_saved_is_refused_before_training(demo, out, tmp_path, monkeypatch):
    (tmp_path / "file.png").touch()
    monkeypatch.setattr(demo, "seconds_of", lambda *args: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match=r"^demo: argument --out: "):
        main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / out)])


def test_where_nobody_watches_a_bar_is_a_line_a_minute(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    now = iter(range(0, 100_000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.bar(1_000, "step") as bar:
        for k in range(1_000):
            bar.set_postfix_str(str(k))
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 1_000 * 2 / 60 - 3 < len(lines) < 1_000 * 2 / 60 + 3
    assert ["1000/1000" in line for line in lines[-2:]] == [False, True]
    assert not any("\r" in line for line in lines)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"triton_brn {triton_brn.__version__}\n"


def test_a_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch):
    from triton_brn import demo

    monkeypatch.setattr(demo, "EXTRAS", ("no_such_package",))
    with pytest.raises(
        SystemExit,
        match=r"^demo needs no_such_package: pip install 'triton_brn\[demo\]', in a .* '\.\[demo\]'",
    ):
        main(["demo"])


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--seeds", "0"], "--seeds"), (["--device", "no"], "--device")]
)
def test_wrong_arguments_are_named(arguments, name, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert f"argument {name}" in capsys.readouterr().err


def test_info_names_versions_and_what_serves_each_device(capsys, monkeypatch):
    main(["info"])
    out = capsys.readouterr().out
    assert triton_brn.__version__ in out
    assert torch.__version__ in out
    assert "plain PyTorch: TRITON_BRN_BACKEND=eager" in out
    monkeypatch.setenv("TRITON_BRN_BACKEND", "typo")
    main(["info"])
    assert "none: TRITON_BRN_BACKEND: expected one of auto, triton, eager" in capsys.readouterr().out
