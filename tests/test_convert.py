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
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tracked: bool, affine: bool) -> None:
    old = nn.BatchNorm1d(3, affine=affine, track_running_stats=tracked).to(dtype)
    if tracked:
        old.running_var.fill_(2.5)
    new = convert_batchnorm(old)
    stats = torch.float64 if dtype == torch.float64 and (affine or tracked) else torch.float32
    assert (new.running_mean.dtype, new.running_var.dtype) == (stats, stats)
    assert new.running_var.tolist() == [2.5 if tracked else 1.0] * 3
    if affine:
        assert new.weight is old.weight
        assert new.bias is old.bias
    if affine or tracked or dtype != torch.float64:
        assert new(torch.randn(8, 3, dtype=dtype)).dtype == dtype


def test_devices() -> None:
    net = convert_batchnorm(Net().to("meta"))
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}


def test_subclasses_are_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.SyncBatchNorm(3), nn.LazyBatchNorm1d(), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    before = list(net)
    with caplog.at_level(logging.WARNING):
        convert_batchnorm(net)
    assert all(a is b for a, b in zip(net, before, strict=True))
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if "SyncBatchNorm" in m]
    assert [m for m in messages if "LazyBatchNorm1d" in m]
    assert len(messages) == 2


def test_training_goes_on_after_conversion() -> None:
    net = trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convert_batchnorm(net, r_max=3.0, d_max=5.0)
    weight = net.shared.weight.detach().clone()
    net(torch.randn(6, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.shared.weight, weight)
    assert net.shared.num_batches_tracked.item() == 8  # twice a batch: three batches before, one now
