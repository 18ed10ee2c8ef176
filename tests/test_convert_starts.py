"""Where a converted layer starts: its limits, its momentum, its counter, and the classes that users name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenormAct2d, Ramp, convert_batchnorm

pytestmark = pytest.mark.usefixtures("eager")

PAPER = (Ramp(1.0, 3.0, 5_000, 40_000), Ramp(0.0, 5.0, 5_000, 25_000))


def counted(norm: nn.Module) -> None:
    norm.num_batches_tracked.fill_(1)


def moved(norm: nn.Module) -> None:
    norm.running_mean[1] = 0.1


def scaled(norm: nn.Module) -> None:
    norm.running_var[2] = 0.9


def loaded_without_counter(norm: nn.Module) -> None:
    """As a checkpoint older than the counter leaves it."""
    norm.num_batches_tracked = None
    norm.running_mean.fill_(2)


def limits(layer: Any) -> tuple[Any, Any]:
    return layer.r_max, layer.d_max


@pytest.mark.parametrize("train", [counted, moved, scaled, loaded_without_counter])
def test_trained_statistics_get_constant_limits(train: Any) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with torch.no_grad():
        train(net[0])
    convert_batchnorm(net)
    assert limits(net[0]) == (3.0, 5.0)
    assert limits(net[1]) == PAPER
    assert net[0].num_batches_tracked.dtype == torch.long
    assert net(torch.randn(2, 3, 4, 4)).isfinite().all()


def test_a_trained_model_starts_where_it_stands() -> None:
    """A pair's output in training is its output in eval; under the ramps of new layers it is not."""
    norm = nn.BatchNorm1d(3)
    for _ in range(200):
        norm(torch.randn(64, 3) * 2 + 1)
    pair = torch.tensor([[2.0, 1.0, -3.0], [4.0, 3.0, 3.0]])
    expected = norm.eval()(pair)
    limits = {"r_max": PAPER[0], "d_max": PAPER[1]}
    at_once, ramps = convert_batchnorm(norm).train(), convert_batchnorm(norm, **limits).train()
    torch.testing.assert_close(at_once(pair), expected)
    assert (ramps(pair) - expected).abs().max() > 0.5
    assert at_once.num_batches_tracked == 202


def test_what_the_caller_says_holds_for_every_layer() -> None:
    ramp = Ramp(1.0, 2.0, 0, 10)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    counted(net[0])
    convert_batchnorm(net, r_max=ramp)
    assert limits(net[0]) == (ramp, 5.0)
    assert limits(net[1]) == (ramp, PAPER[1])
    assert net[0].num_batches_tracked == 1


def test_on_the_meta_device_statistics_cannot_be_read() -> None:
    assert limits(convert_batchnorm(nn.BatchNorm2d(3, device="meta"))) == PAPER


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [(0.1, 0.01), (0.01, 0.01), (0.001, 0.001), (0.0, 0.0), (0.5, 0.01), (None, 0.01)],
)
def test_momentum_is_001_or_less(momentum: float | None, expected: float) -> None:
    norm = nn.BatchNorm2d(3, momentum=momentum)
    assert convert_batchnorm(norm).momentum == expected
    counted(norm)
    assert convert_batchnorm(norm).momentum == expected
    assert convert_batchnorm(norm, momentum=0.2).momentum == 0.2
    assert convert_batchnorm(norm, momentum=None).momentum is None


def test_channels_that_were_cut_away() -> None:
    """Tools for pruning shorten the tensors and may forget num_features."""
    norm = nn.BatchNorm2d(5)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).data = getattr(norm, name).data[:3].clone()
    net = convert_batchnorm(nn.Sequential(norm))
    assert net[0].num_features == 3
    assert net(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


class Subclass(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class Own(nn.Module):
    """A batch norm that somebody wrote, of BatchNorm's attributes."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.eps = 1e-3
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        if affine:
            self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, None, None, self.training)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


@pytest.mark.parametrize("layer", [Subclass(3), Own(3), Own(3, affine=False)])
def test_classes_that_become_ours(layer: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(layer, nn.BatchNorm2d(3))
    weight = getattr(layer, "weight", None)
    with caplog.at_level(logging.INFO, "triton_brn"):
        convert_batchnorm(net, classes={type(layer): BatchRenorm2d})
    assert net[0] is layer
    assert [type(m) for m in net] == [BatchRenorm2d] * 2
    assert (layer.eps, layer.momentum, layer.affine) == (1e-3, 0.01, weight is not None)
    assert layer.weight is weight
    y = net(torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), rtol=1e-2, atol=0)
    assert layer.num_batches_tracked == 1
    assert [r.levelno for r in caplog.records] == [logging.INFO]


def test_a_class_that_becomes_a_layer_with_an_activation() -> None:
    net = convert_batchnorm(nn.Sequential(Own(3)), classes={Own: BatchRenormAct2d})
    assert type(net[0].act) is nn.ReLU
    assert net(torch.randn(2, 3, 4, 4)).min() == 0


def test_a_function_makes_what_takes_a_layers_place() -> None:
    made = []

    def make(layer: Any) -> nn.Module:
        made.append(BatchRenorm1d(7))
        return made[-1]

    shared = Branches()
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, Branches(), nn.BatchNorm2d(3))})
    convert_batchnorm(net, classes={Branches: make})
    assert len(made) == 2
    assert net["a"] is net["b"][0] is made[0]
    assert net["b"][1] is made[1]
    assert type(net["b"][2]) is BatchRenorm2d
    assert convert_batchnorm(shared, classes={Branches: make}) is made[2]
    assert type(shared.norm) is nn.BatchNorm2d


def test_a_layer_that_is_replaced_is_not_left_in_a_list() -> None:
    net = nn.Sequential(Branches(), nn.BatchNorm2d(3))
    net.branches = {"a": net[0]}
    with pytest.raises(
        ValueError, match=r"^convert_batchnorm: .* also held by Sequential\.branches, outside"
    ):
        convert_batchnorm(net, classes={Branches: lambda _: BatchRenorm1d(7)})
    assert [type(m) for m in net] == [Branches, nn.BatchNorm2d]


def test_the_users_word_goes_before_ours() -> None:
    class Mine(BatchRenorm2d):
        pass

    net = nn.Sequential(nn.BatchNorm2d(3), Subclass(3))
    convert_batchnorm(net, classes={nn.BatchNorm2d: Mine})
    assert [type(m) for m in net] == [Mine, Subclass]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_layers_are_left() -> None:
    net = nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)), nn.BatchNorm2d(3))
    convert_batchnorm(net)
    assert type(net[1]) is BatchRenorm2d
    with pytest.raises(ValueError, match="scripted: convert first"):
        convert_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))
