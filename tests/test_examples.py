"""Every program in examples/, a short run each: it ends, prints what it found, and trains our layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from triton_brn import BatchRenorm1d, BatchRenorm2d

pytestmark = pytest.mark.usefixtures("eager", "one_thread")
EXAMPLES = {path.stem for path in (Path(__file__).parent.parent / "examples").glob("*.py")}


@pytest.fixture(name="one_thread")
def _one_thread() -> Iterator[None]:
    """As the programs do when they are run: their networks are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str, *packages: str) -> Any:
    """The program as a module, where the packages that it needs are installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"examples/{name}.py was not run: it needs {package}")
    return importlib.import_module(name)


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (BatchRenorm1d, BatchRenorm2d))]


def test_each_says_how_it_is_run() -> None:
    programs = EXAMPLES - {"torchvision_schemas"}
    assert len(programs) >= 4
    for name in programs:
        text = (Path(__file__).parent.parent / "examples" / f"{name}.py").read_text()
        assert f"    python examples/{name}.py --quick" in text, name
        assert f"def test_{name}" in Path(__file__).read_text(), f"{name} has no test"


def test_crossq_pendulum(capsys: pytest.CaptureFixture[str]) -> None:
    crossq = example("crossq_pendulum", "sb3_contrib")
    found = crossq.main(["--quick"])
    assert found.keys() == {"sb3-contrib", "triton_brn"}
    assert all(-2000 < value < 0 for values in found.values() for value in values)
    out = capsys.readouterr().out
    assert "mean return" in out
    assert out.count(" ms\n") == 2


def test_crossq_pendulum_trains_our_layers_in_the_calls_that_are_training() -> None:
    """Statistics of the critics move each update, the actor's each third; evaluation moves none."""
    crossq = example("crossq_pendulum", "sb3_contrib")
    model = crossq.agent("triton_brn", seed=0, width=16, warmup=3)
    model.learning_starts = 20
    actor, critic = norms(model.policy.actor), norms(model.policy.critic)
    assert len(actor) == 3
    assert len(critic) == 2 * 3
    model.learn(32)  # 12 updates
    assert {int(layer.num_batches_tracked) for layer in critic} == {12}
    assert {int(layer.num_batches_tracked) for layer in actor} == {4}
    for layer in actor + critic:
        assert layer.running_mean.isfinite().all()
        assert layer.running_mean.count_nonzero() > 0
        assert not layer.training
        assert layer.weight.grad is not None
    model.policy.critic.set_bn_training_mode(True)
    assert all(layer.training for layer in critic)
    before = [layer.running_mean.clone() for layer in actor]
    model.predict(model.observation_space.sample())
    assert all(torch.equal(a, layer.running_mean) for a, layer in zip(before, actor, strict=True))


def test_crossq_torchrl(capsys: pytest.CaptureFixture[str]) -> None:
    crossq = example("crossq_torchrl", "torchrl")
    found = crossq.main(["--quick"])
    assert found.keys() == {"random actions", "torchrl", "triton_brn"}
    assert capsys.readouterr().out.count("ms a step") == 2


def test_crossq_torchrl_moves_stacked_statistics_as_torchrl_does() -> None:
    """During warm-up the layers compute the same: losses, statistics of both critics and counters agree."""
    crossq = example("crossq_torchrl", "torchrl")
    losses = {}
    for ours in (True, False):
        losses[ours] = crossq.make_loss(ours, warmup=1_000)
        torch.manual_seed(0)
        crossq.train(losses[ours], steps=3)
    a, b = (dict(loss.qvalue_network_params.flatten_keys(".").items()) for loss in losses.values())
    assert a.keys() == b.keys()
    assert any("running_var" in name for name in a)
    for name in a:
        assert a[name].shape[0] == 2, "two critics"
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)
        if "num_batches_tracked" in name:
            assert a[name].tolist() == [3, 3]


def test_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("pairs", "timm", "mlxtend").main(["--quick"])
    assert found["upright"] > 60
    assert found["Batch Renorm"] > found["BatchNorm"] + 5, found
    assert "pairs of one class" in capsys.readouterr().out


def test_segmentation(capsys: pytest.CaptureFixture[str]) -> None:
    segmentation = example("segmentation", "monai")
    found = segmentation.main(["--quick"])
    assert found.keys() == {"BatchNorm", "Batch Renorm"}
    assert all(0 < score <= 1 for score in found.values())
    assert capsys.readouterr().out.count("Dice") == 2
    assert len(norms(segmentation.network("Batch Renorm", 10))) == 13
