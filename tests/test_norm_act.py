"""BatchRenormAct2d: batch renorm, dropout and an activation in one layer. Norms of that shape become it."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import triton_brn.activated as activated
from triton_brn import BatchRenorm2d, BatchRenorm3d, BatchRenormAct2d, Ramp, convert_batchnorm

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_norm_then_drop_then_act(training: bool, backend: str) -> None:
    layer = BatchRenormAct2d(3, act_layer=nn.SiLU, drop_layer=lambda: nn.Hardtanh(-0.5, 0.5), r_max=2.0)
    norm = BatchRenorm2d(3, r_max=2.0)
    norm.load_state_dict(layer.state_dict())
    for module in (layer, norm):
        module.train(training)
    for _ in range(2):
        x = torch.randn(2, 3, 3, 2) * 2 + 1
        torch.testing.assert_close(layer(x), nn.functional.silu(norm(x).clamp(-0.5, 0.5)))
    torch.testing.assert_close(layer.state_dict(), norm.state_dict())


def test_gradients_pass_an_activation_in_place(backend: str) -> None:
    layer, norm = BatchRenormAct2d(3), BatchRenorm2d(3)
    assert layer.act.inplace
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for a, b in zip(
        *(torch.autograd.grad(f(x).square().sum(), x) for f in (layer, lambda t: norm(t).relu())), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "act"),
    [
        ({}, "ReLU(inplace=True)"),
        ({"inplace": False}, "ReLU()"),
        ({"apply_act": False}, "Identity()"),
        ({"act_layer": None}, "Identity()"),
        ({"act_layer": ""}, "Identity()"),
        ({"act_layer": nn.GELU}, "GELU(approximate='none')"),
        ({"act_layer": nn.GELU, "act_kwargs": {"approximate": "tanh"}}, "GELU(approximate='tanh')"),
        ({"act_layer": nn.ELU, "act_kwargs": {"alpha": 0.2, "inplace": False}}, "ELU(alpha=0.2)"),
        ({"act_layer": nn.ELU, "act_kwargs": {"alpha": 0.5}}, "ELU(alpha=0.5, inplace=True)"),
        ({"act_layer": "relu"}, "ReLU(inplace=True)"),
        ({"act_layer": "hard_swish"}, "Hardswish()"),
        ({"act_layer": "leaky_relu"}, "LeakyReLU(negative_slope=0.01, inplace=True)"),
        ({"act_layer": "swish"}, "SiLU(inplace=True)"),
        ({"act_layer": lambda: nn.Tanh()}, "Tanh()"),
    ],
)  # fmt: skip
def test_activations(arguments: dict[str, Any], act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(activated.sys.modules, "timm.layers", raising=False)
    kwargs = copy.deepcopy(arguments.get("act_kwargs"))
    assert repr(BatchRenormAct2d(3, **arguments).act) == act
    assert arguments.get("act_kwargs") == kwargs
    assert type(BatchRenormAct2d(3, **arguments).drop) is nn.Identity


def test_an_unknown_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(activated.sys.modules, "timm.layers", raising=False)
    with pytest.raises(ValueError, match=r"^act_layer: expected an activation's name, got 'rleu' \(timm's"):
        BatchRenormAct2d(3, act_layer="rleu")


def test_arguments() -> None:
    layer = BatchRenormAct2d(3, 1e-3, 0.2, False, True, device="meta", dtype=torch.float64)
    assert (layer.eps, layer.momentum, layer.weight) == (1e-3, 0.2, None)
    assert (layer.running_mean.device.type, layer.running_mean.dtype) == ("meta", torch.float64)
    layer = BatchRenormAct2d(3, bias=False, r_max=2.0, d_max=Ramp(0, 1), running_average="var")
    assert (layer.bias, layer.r_max, layer.d_max, layer.running_average) == (None, 2.0, Ramp(0, 1), "var")
    with pytest.raises(ValueError, match=r"4D input"):
        layer(torch.randn(2, 3))


def test_copies_pickles_scripts_and_traces() -> None:
    layer = BatchRenormAct2d(3)
    layer(torch.randn(4, 3, 2, 2))
    layer.eval()
    x = torch.randn(4, 3, 2, 2)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.jit.script(layer)]
    others += [torch.fx.symbolic_trace(nn.Sequential(layer)), torch.compile(layer, backend="eager")]
    for other in others:
        torch.testing.assert_close(other(x), layer(x))


class NormAct(nn.BatchNorm2d):
    """A norm of timm's shape that somebody wrote."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class NormAct3d(nn.BatchNorm3d):
    def __init__(self) -> None:
        super().__init__(3)
        self.act = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class SyncAct(nn.SyncBatchNorm):
    def __init__(self) -> None:
        super().__init__(3)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class ActFirst(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm2d.forward(self, self.act(self.drop(x)))


class Residual(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


class DropAfterAct(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


class Unbiased(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(1.1 * nn.BatchNorm2d.forward(self, x)))


class NeedsMore(NormAct):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Between(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(2 * self.drop(nn.BatchNorm2d.forward(self, x)))


class OwnTraining(NormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.chunk(2) if self.training else (x,)
        return self.act(self.drop(torch.cat([nn.BatchNorm2d.forward(self, half) for half in halves])))


class Third(NormAct):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(super().forward(x))


def fill(norm: Any) -> Any:
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.copy_(torch.rand(3) + 0.5)
    return norm.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_of_that_shape_keep_drop_and_act(dtype: torch.dtype) -> None:
    drop, act = nn.Dropout(0.5), nn.LeakyReLU(0.3)
    seen: list[int] = []
    act.register_forward_hook(lambda *_: seen.append(1))
    old = fill(NormAct(3, act, drop)).to(dtype)
    x = torch.randn(4, 3, 2, 2).to(dtype)
    expected = old(x)
    net = convert_batchnorm(nn.Sequential(old))
    assert len(seen) == 1, "the activation was called to find out what the layer is"
    assert type(net[0]) is BatchRenormAct2d
    assert (net[0].drop, net[0].act) == (drop, act)
    torch.testing.assert_close(net(x), expected, rtol=1e-2, atol=1e-2)
    assert net.train()(x).dtype == dtype


@pytest.mark.parametrize(
    ("old", "kind", "shape"),
    [(NormAct3d(), activated.BatchRenormAct3d, (2, 3, 2, 2, 2)), (SyncAct(), BatchRenormAct2d, (4, 3, 2))],
)
def test_without_drop_and_of_other_ranks(old: nn.Module, kind: type, shape: tuple[int, ...]) -> None:
    fill(old)
    x = torch.randn(shape)
    expected = old(x)
    net = convert_batchnorm(nn.Sequential(old))
    assert type(net[0]) is kind
    torch.testing.assert_close(net(x), expected)
    assert (kind is activated.BatchRenormAct3d) == isinstance(net[0], BatchRenorm3d)


@pytest.mark.parametrize(
    "kind", [ActFirst, Residual, DropAfterAct, Unbiased, Between, OwnTraining, NeedsMore, Third]
)
def test_other_shapes_are_left(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(fill(kind(3, nn.ReLU(), nn.Identity())), nn.BatchNorm2d(3))
    with caplog.at_level(logging.WARNING, "triton_brn"):
        convert_batchnorm(net)
    assert [type(m) for m in net] == [kind, BatchRenorm2d]
    assert f"1 left (0: {kind.__name__}, a subclass of BatchNorm2d that may do more" in caplog.text


def test_on_the_meta_device() -> None:
    net = convert_batchnorm(nn.Sequential(NormAct(3, nn.ReLU(), nn.Identity())).to("meta"))
    assert type(net[0]) is BatchRenormAct2d


def test_finding_out_changes_nothing() -> None:
    net = nn.Sequential(NormAct(3, nn.ReLU(), nn.Dropout()), ActFirst(3, nn.ReLU(), nn.Dropout()))
    state = copy.deepcopy(net.state_dict())
    convert_batchnorm(net)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert all(m.training for m in net.modules())
    assert not any(child._forward_hooks for m in net for child in (m.drop, m.act))
