"""convert_batchnorm: what is replaced, what is kept."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, convert_batchnorm

pytestmark = pytest.mark.usefixtures("eager")


class Net(nn.Module):
    """BatchNorm in containers, as an attribute, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())
        self.shared = self.features[1]
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False))})
        self.unused: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["a"](self.shared(self.features(x)).mean((2, 3)))


def trained() -> Net:
    net = Net()
    for _ in range(3):
        net(torch.randn(6, 2, 5, 5) * 2)
    nn.init.normal_(net.shared.weight)
    return net


def test_a_model_is_changed_in_place() -> None:
    net = trained()
    parameters, state = list(net.parameters()), copy.deepcopy(net.state_dict())
    x = torch.randn(6, 2, 5, 5)
    expected = net.eval()(x)
    assert convert_batchnorm(net) is net
    assert type(net.features[1]) is BatchRenorm2d
    assert net.shared is net.features[1]
    assert type(net.heads["a"][1]) is BatchRenorm1d
    assert not [m for m in net.modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters], "an optimizer would lose them"
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-6)
    assert net.train()(x).isfinite().all()


def test_a_second_call_changes_nothing() -> None:
    net = convert_batchnorm(trained())
    modules = dict(net.named_modules())
    assert convert_batchnorm(net, momentum=0.5) is net
    assert all(modules[name] is m for name, m in net.named_modules())
    assert net.shared.momentum == 0.01


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("norm", "renorm"),
    [(nn.BatchNorm1d, BatchRenorm1d), (nn.BatchNorm2d, BatchRenorm2d), (nn.BatchNorm3d, BatchRenorm3d)],
)
def test_a_layer_gives_a_new_layer(norm: type, renorm: type, training: bool) -> None:
    old = norm(3, eps=1e-4, momentum=0.3).train(training)
    old.weight.requires_grad_(False)
    new = convert_batchnorm(old)
    assert type(new) is renorm
    assert (new.num_features, new.eps, new.momentum, new.affine) == (3, 1e-4, 0.01, True)
    assert new.training is training
    assert (new.weight.requires_grad, new.bias.requires_grad) == (False, True)
    assert type(old) is norm


def test_options_reach_the_new_layers() -> None:
    ramp = Ramp(1.0, 2.0, begin=1, end=3)
    net = convert_batchnorm(Net(), momentum=None, r_max=ramp, d_max=1.5, running_average="var")
    for layer in (net.shared, net.heads["a"][1]):
        assert (layer.momentum, layer.r_max, layer.d_max) == (None, ramp, 1.5)
        assert layer.running_average == "var"


def test_a_bad_option_leaves_the_model_as_it_was() -> None:
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=r"^r_max: "):
        convert_batchnorm(net, r_max=0.5)
    with pytest.raises(TypeError, match=r"rmax"):
        convert_batchnorm(net, rmax=3.0)
    assert all(before[name] is m for name, m in net.named_modules())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, affine: bool) -> None:
    old = nn.BatchNorm1d(3, affine=affine).to(dtype)
    old.running_var.fill_(2.5)
    new = convert_batchnorm(old)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    assert (new.running_mean.dtype, new.running_var.dtype) == (stats, stats)
    assert new.running_var.tolist() == [2.5] * 3
    assert (new.affine, new.weight, new.bias) == (affine, old.weight, old.bias)
    assert new(torch.randn(8, 3, dtype=dtype)).dtype == dtype
    assert old.running_mean.dtype == dtype


def test_devices() -> None:
    net = convert_batchnorm(Net().to("meta"))
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}


class Scaled(nn.BatchNorm2d):
    """A subclass that does more than its norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def left_alone() -> list[nn.Module]:
    """Layers that are not converted."""
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    switched = nn.BatchNorm2d(3)
    switched.track_running_stats = False  # torch then neither reads nor updates them in training
    return [Scaled(3), Scaled(3), nn.LazyBatchNorm1d(), untracked, switched]


def test_one_line_says_what_was_converted_and_what_was_left(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), *left_alone())
    net += nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    before, kinds = list(net), [type(m) for m in net]
    with caplog.at_level(logging.INFO, "triton_brn"):
        assert convert_batchnorm(net) is net
    assert list(net) == before
    assert [type(m) for m in net] == [BatchRenorm1d, BatchRenorm2d, BatchRenorm2d, *kinds[3:]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "convert_batchnorm: 3 converted (1 BatchNorm1d to BatchRenorm1d, 2 BatchNorm2d to BatchRenorm2d); "
        "2 left (3, 4: Scaled, a subclass of BatchNorm2d that may do more: name it in classes= "
        "if it does not); "
        "1 left (5: LazyBatchNorm1d, not initialised: run a batch first); "
        "2 left (6, 7: BatchNorm2d, without running statistics)"
    )


def test_where_nothing_is_left_the_line_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "triton_brn"):
        convert_batchnorm(Net())
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "2 converted" in record.getMessage()


@pytest.mark.parametrize("number", range(5))
def test_nothing_converted_is_an_error_that_says_why(number: int) -> None:
    with pytest.raises(ValueError, match=r"^convert_batchnorm: nothing was converted; 1 left \(1: "):
        convert_batchnorm(nn.Sequential(nn.ReLU(), left_alone()[number]))
    with pytest.raises(ValueError, match=r"nothing was converted; 1 left \(itself: "):
        convert_batchnorm(left_alone()[number])


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and detectron's: constants in buffers, and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))


def test_what_is_no_batchnorm_is_not_touched() -> None:
    others = [FrozenBatchNorm2d(), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True)]
    net = nn.Sequential(*others, nn.LocalResponseNorm(2), nn.LayerNorm(3), nn.BatchNorm2d(3))
    before = [(type(m), dict(vars(m))) for m in net[:-1]]
    convert_batchnorm(net)
    assert [(type(m), dict(vars(m))) for m in net[:-1]] == before
    assert type(net[-1]) is BatchRenorm2d


def test_a_model_without_batchnorm_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nothing was converted: the module has no BatchNorm$"):
        convert_batchnorm(nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3)))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list$"):
        convert_batchnorm([nn.BatchNorm1d(3)])


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_syncbatchnorm_takes_every_rank_and_is_told_once(
    shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU(), nn.SyncBatchNorm(3))
    x = torch.randn(shape)
    expected = copy.deepcopy(net).eval()(x)
    with caplog.at_level(logging.INFO, "triton_brn"):
        convert_batchnorm(net)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("SyncBatchNorm: each process now has statistics of its own")
    assert type(net[0]) is BatchRenorm2d
    assert not [m for m in net if isinstance(m, nn.SyncBatchNorm)]
    assert net(x).shape == shape
    assert copy.deepcopy(convert_batchnorm(nn.Sequential(nn.SyncBatchNorm(3))))(x).shape == shape
    torch.testing.assert_close(convert_batchnorm(nn.SyncBatchNorm(3)).eval()(x).relu(), expected)


def test_training_goes_on_after_conversion() -> None:
    net = trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convert_batchnorm(net, r_max=3.0, d_max=5.0)
    weight = net.shared.weight.detach().clone()
    net(torch.randn(6, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.shared.weight, weight)
    assert net.shared.num_batches_tracked.item() == 8  # twice a batch: three batches before, one now
