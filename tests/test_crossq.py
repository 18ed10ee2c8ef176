"""CrossQ of sb3-contrib with our layers: it trains them, and its zips hold them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_brn import BatchRenorm1d, Ramp, convert_batchrenorm

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")
sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytestmark = pytest.mark.usefixtures("eager")


def crossq(**options: Any) -> Any:
    return sb3_contrib.CrossQ(
        "MlpPolicy",
        gymnasium.make("Pendulum-v1"),
        policy_kwargs={"net_arch": {"pi": [16], "qf": [16, 16]}, "renorm_warmup_steps": 20},
        learning_starts=32,
        batch_size=32,
        seed=0,
        device="cpu",
        **options,
    )


def layers(model: Any) -> list[Any]:
    return [m for m in model.policy.modules() if isinstance(m, BatchRenorm1d)]


def test_one_line_and_it_trains() -> None:
    """sb3-contrib switches our layers as its own, so their statistics move as the original's do."""
    model, original = crossq(), crossq()
    kinds = [type(m).__name__ for m in model.policy.modules()]
    optimizers = (model.actor.optimizer, model.critic.optimizer)
    parameters = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    assert convert_batchrenorm(model.policy) is model.policy
    assert [type(m).__name__ for m in model.policy.modules()] == kinds
    held = [*model.actor.parameters(), *model.critic.parameters()]
    assert {id(p) for p in parameters} == {id(p) for p in held}
    assert len(layers(model)) == 8
    assert {layer.r_max for layer in layers(model)} == {Ramp(1, 3.0, 21, 21)}
    for each in (model, original):
        each.learn(33 + 40)
    assert {int(layer.num_batches_tracked) for layer in layers(model)} == {41, 13}
    theirs = original.policy.state_dict()
    for name, value in model.policy.state_dict().items():
        assert value.isfinite().all()
        if name.endswith("steps"):
            assert value == theirs[name]
    first = next(name for name in theirs if name.endswith("qf0.0.ra_mean"))
    torch.testing.assert_close(model.policy.state_dict()[first], theirs[first], rtol=0.05, atol=0.05)
    assert not [layer for layer in layers(model) if (layer.running_mean == 0).all()]
    assert not any(layer.training for layer in layers(model))


def test_zips_go_both_ways(tmp_path: Path) -> None:
    old = crossq()
    old.learn(40)
    old.save(tmp_path / "old.zip")
    observation = torch.randn(5, 3).numpy()
    expected = old.predict(observation, deterministic=True)[0]

    loaded = sb3_contrib.CrossQ.load(tmp_path / "old.zip", env=old.env)
    convert_batchrenorm(loaded.policy)
    assert loaded.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)
    given = crossq()
    convert_batchrenorm(given.policy)
    given.set_parameters(str(tmp_path / "old.zip"))
    assert given.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)
    steps = [int(layer.num_batches_tracked) for layer in layers(given)]
    assert steps == [int(layer.num_batches_tracked) for layer in layers(loaded)]
    assert max(steps) > 1

    for model in (loaded, given):
        model.learn(40, reset_num_timesteps=False)
        assert max(int(layer.num_batches_tracked) for layer in layers(model)) > max(steps)
    given.save(tmp_path / "ours.zip")
    back = sb3_contrib.CrossQ.load(tmp_path / "ours.zip")
    expected = given.predict(observation, deterministic=True)[0]
    assert back.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)
    convert_batchrenorm(back.policy)
    assert back.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)


def test_a_policy_is_saved_and_loaded_by_itself() -> None:
    model = crossq()
    convert_batchrenorm(model.policy)
    model.learn(40)
    file = io.BytesIO()
    model.policy.save(file)
    file.seek(0)
    policy = type(model.policy).load(file)
    observation = torch.randn(5, 3).numpy()
    expected = model.predict(observation, deterministic=True)[0]
    assert policy.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)
    convert_batchrenorm(policy)
    assert policy.predict(observation, deterministic=True)[0] == pytest.approx(expected, abs=1e-4)
