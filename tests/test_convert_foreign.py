"""convert_batchrenorm: layers of torchrl, sb3-contrib and ludvb/batchrenorm become ours and go on."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, convert_batchrenorm

pytestmark = pytest.mark.usefixtures("eager")


def torchrl_layer(*args: Any, **options: Any) -> Any:
    return pytest.importorskip("torchrl.modules").BatchRenorm1d(*args, **options)


def stable_baselines_layer(*args: Any, **options: Any) -> Any:
    return pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d(*args, **options)


class Ludvb(nn.Module):
    """The form of ludvb/batchrenorm: eps beside the standard deviation, which is kept; fixed ramps."""

    def __init__(self, features: int, eps: float = 1e-3, momentum: float = 0.01, affine: bool = True) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_std", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.affine, self.eps, self.momentum, self.step = affine, eps, momentum, 0

    @property
    def rmax(self) -> torch.Tensor:
        return (1 + 2 * (self.num_batches_tracked - 5_000) / 35_000).clamp(1, 3)

    @property
    def dmax(self) -> torch.Tensor:
        return (5 * (self.num_batches_tracked - 5_000) / 20_000).clamp(0, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = [0, *range(2, x.ndim)]
        over = (1, -1, *(1,) * (x.ndim - 2))
        mean, std = self.running_mean.view(over), self.running_std.view(over)
        if self.training:
            m, s = x.mean(axes, keepdim=True), x.std(axes, correction=0, keepdim=True) + self.eps
            r = torch.clamp((s / std).detach(), 1 / self.rmax, self.rmax)
            d = torch.clamp(((m - mean) / std).detach(), -self.dmax, self.dmax)
            out = (x - m) / s * r + d
            self.running_mean += self.momentum * (m.detach().flatten() - self.running_mean)
            self.running_std += self.momentum * (s.detach().flatten() - self.running_std)
            self.num_batches_tracked += 1
        else:
            out = (x - mean) / std
        return self.weight.view(over) * out + self.bias.view(over) if self.affine else out


class BatchRenorm(Ludvb):
    pass


class BatchRenorm2D(Ludvb):
    pass


class BatchRenorm3D(Ludvb):
    pass


def scripted() -> Any:
    """ludvb/batchrenorm's layers are ScriptModules."""

    class BatchRenorm1d(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.tensor([1.0, -2.0, 3.0]))
            self.register_buffer("running_std", torch.tensor([0.5, 1.0, 2.0]))
            self.register_buffer("num_batches_tracked", torch.tensor(7))
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
            self.bias = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))
            self.affine, self.eps, self.momentum, self.step = True, 1e-3, 0.01, 0

        @property
        def rmax(self) -> torch.Tensor:
            return torch.ones(())

        @property
        def dmax(self) -> torch.Tensor:
            return torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x - self.running_mean) / self.running_std + self.bias

    return BatchRenorm1d()


def randomised(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def batches(shape: tuple[int, ...], n: int) -> Iterator[torch.Tensor]:
    """Batches of changing mean and scale, so that r and d are clipped now and then."""
    for i in range(n):
        yield torch.randn(shape) * (0.2 + i % 5) + (i % 3) * 2


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_torchrl(warmup: int, backend: str) -> None:
    theirs = randomised(torchrl_layer(3, momentum=0.2, eps=1e-3, max_r=2.0, max_d=1.5, warmup_steps=warmup))
    net = nn.Sequential(copy.deepcopy(theirs))
    layer, weight, mean = net[0], net[0].weight, net[0].running_mean
    assert convert_batchrenorm(net) is net
    ours = net[0]
    assert ours is layer
    assert type(ours) is BatchRenorm1d
    assert (ours.weight is weight, ours.running_mean is mean) == (True, True)
    assert (ours.momentum, ours.eps, ours.running_average, ours.affine) == (0.2, 1e-3, "var", True)
    assert (ours.r_max, ours.d_max) == (Ramp(1, 2.0, warmup, warmup), Ramp(0, 1.5, warmup, warmup))
    assert not {"max_r", "max_d", "warmup_steps", "smooth"} & set(vars(ours))
    for step, x in enumerate(batches((16, 3), 7)):
        if warmup and step >= 2 * warmup:
            break  # torchrl's factor is 2 from here on: r and d beyond their limits
        torch.testing.assert_close(net(x), theirs(x))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked
    torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


def test_torchrls_state_is_taken() -> None:
    theirs = randomised(torchrl_layer(3))
    for x in batches((8, 3), 3):
        theirs(x)
    ours = BatchRenorm1d(3)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.num_batches_tracked == 3


def test_torchrls_smooth_warm_up_is_a_ramp_over_the_same_steps() -> None:
    ours = convert_batchrenorm(torchrl_layer(3, warmup_steps=100, smooth=True))
    assert (ours.r_max, ours.d_max) == (Ramp(1, 3.0, 0, 100), Ramp(0, 5.0, 0, 100))


@pytest.mark.parametrize("affine", [True, False])
def test_sb3_contrib(affine: bool, backend: str) -> None:
    """Theirs from ours: they normalise by the unbiased variance s^2, and by sqrt(s^2 / r^2 + eps)."""
    theirs = randomised(stable_baselines_layer(3, momentum=0.2, affine=affine, warmup_steps=3))
    net = nn.Sequential(copy.deepcopy(theirs))
    layer, scale, mean = net[0], net[0].scale, net[0].ra_mean
    convert_batchrenorm(net)
    ours = net[0]
    assert ours is layer
    assert isinstance(ours, BatchRenorm1d)
    assert (ours.weight is scale, ours.running_mean is mean) == (affine, True)
    assert (ours.momentum, ours.eps, ours.running_average, ours.affine) == (0.2, 1e-3, "var", affine)
    assert (ours.r_max, ours.d_max) == (Ramp(1, 3.0, 4, 4), Ramp(0, 5.0, 4, 4))
    weight, bias = (ours.weight, ours.bias) if affine else (1.0, 0.0)
    for step, x in enumerate(batches((8, 3), 12)):
        s2, sigma = x.var(0), (x.var(0, correction=0) + 1e-3).sqrt()
        running = (theirs.ra_var + 1e-3).sqrt()
        on = step > 3
        r = ((s2 + 1e-3).sqrt() / running).clamp(1 / 3, 3) if on else torch.ones(3)
        r_ours = (sigma / running).clamp(1 / 3, 3) if on else r
        d = ((x.mean(0) - theirs.ra_mean) / running).clamp(-5, 5) if on else torch.zeros(3)
        normal = ((net(x) - bias) / weight - d) / r_ours * sigma  # x - mean of the batch
        expected = (normal + d * s2.sqrt() / r) / (s2 / r**2 + 1e-3).sqrt() * weight + bias
        torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.running_mean, theirs.ra_mean)
        torch.testing.assert_close(ours.running_var, theirs.ra_var)
        assert ours.num_batches_tracked == theirs.steps
    torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


def test_sb3_contribs_layer_stays_of_its_class_and_pickles() -> None:
    layer = stable_baselines_layer(3)
    theirs, kept = type(layer), [0]
    layer.mine = kept
    net = convert_batchrenorm(nn.Sequential(layer))
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other[0], theirs)
        assert isinstance(other[0], BatchRenorm1d)
        assert type(other[0]) is type(net[0])
        assert other[0].mine == kept
        assert other(torch.randn(4, 3)).shape == (4, 3)
        assert other[0].num_batches_tracked == 1
        other[0].num_batches_tracked.zero_()


def test_sb3_contribs_state_goes_both_ways() -> None:
    theirs, other = (randomised(stable_baselines_layer(3)) for _ in range(2))
    for x in batches((8, 3), 3):
        theirs(x)
    ours = convert_batchrenorm(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    back = convert_batchrenorm(stable_baselines_layer(3))
    back.load_state_dict(theirs.state_dict())
    back.load_state_dict({**back.state_dict(), "ra_mean": theirs.ra_mean + 1})
    plain = BatchRenorm1d(3, eps=1e-3)
    plain.load_state_dict(theirs.state_dict())
    without = BatchRenorm1d(3, affine=False)
    without.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    torch.testing.assert_close(other.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(plain.eval()(x), theirs(x))
    torch.testing.assert_close(back.running_mean, theirs.ra_mean + 1)
    assert plain.num_batches_tracked == without.num_batches_tracked == 3
    assert {"weight", "running_mean"} <= set(plain.state_dict())
    with pytest.raises(RuntimeError, match="running_var"):
        plain.load_state_dict({n: t for n, t in theirs.state_dict().items() if n != "ra_var"})


def test_an_affine_layer_takes_no_state_without_scale() -> None:
    state = stable_baselines_layer(3).state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match="weight"):
        BatchRenorm1d(3).load_state_dict(state)


@pytest.mark.parametrize(("kind", "shape"), [(BatchRenorm2D, (4, 3, 3, 3)), (BatchRenorm3D, (2, 3, 3, 2, 2))])
@pytest.mark.parametrize("steps", [0, 15_000, 50_000])
@pytest.mark.parametrize("affine", [True, False])
def test_ludvb(kind: Any, shape: tuple[int, ...], steps: int, affine: bool) -> None:
    theirs = randomised(kind(3, momentum=0.2, affine=affine))
    theirs.num_batches_tracked.fill_(steps)
    net = nn.Sequential(copy.deepcopy(theirs))
    convert_batchrenorm(net)
    ours = net[0]
    assert type(ours) is (BatchRenorm2d if kind is BatchRenorm2D else BatchRenorm3d)
    assert (ours.momentum, ours.running_average, ours.affine) == (0.2, "std", affine)
    for x in batches(
        shape, 5
    ):  # standard deviations of 0.2 and more: eps of 1e-3 beside them is 5e-3 at most
        torch.testing.assert_close(net(x), theirs(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(
            (ours.running_var + ours.eps).sqrt(), theirs.running_std, rtol=5e-3, atol=0
        )
        assert ours.num_batches_tracked == theirs.num_batches_tracked
    plain = type(ours)(3, affine=affine)
    if affine:
        plain.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(plain.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(convert_batchrenorm(theirs).eval()(x), theirs.eval()(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_layer_is_replaced() -> None:
    theirs = scripted()
    calls: list[int] = []
    handle = theirs.register_forward_hook(lambda *_: calls.append(1))
    net = nn.ModuleDict({"a": nn.Sequential(theirs), "b": theirs})
    parameters = list(net.parameters())
    x = torch.randn(4, 3)
    expected = net["b"](x)
    convert_batchrenorm(net.eval())
    assert type(net["b"]) is BatchRenorm1d
    assert net["a"][0] is net["b"]
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(net["a"](x), expected)
    assert len(calls) == 2
    handle.remove()
    net["b"](x)
    assert len(calls) == 2
    assert net["b"].num_batches_tracked == 7


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_layer_in_a_list_is_refused_before_anything_changes() -> None:
    net = nn.Sequential(torchrl_layer(3), nn.Sequential(scripted()))
    net[1].layers = [net[1][0]]
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"also held by Sequential\.layers"):
        convert_batchrenorm(net)
    assert [type(m) for m in net.modules()] == kinds


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(torchrl_layer(3), stable_baselines_layer(3))
    prune.random_unstructured(net[1], "scale", 0.5)
    kinds = [type(m) for m in net]
    with pytest.raises(ValueError, match=r"in 1, got .*scale_orig.*: remove pruning"):
        convert_batchrenorm(net)
    assert [type(m) for m in net] == kinds
    with pytest.raises(ValueError, match=r"expected a class of 1d, 2d or 3d, got BatchRenorm for 0"):
        convert_batchrenorm(nn.Sequential(BatchRenorm(3)))
    with pytest.raises(ValueError, match=r"the module has no batch renorm layer$"):
        convert_batchrenorm(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"1 left \(0: Ludvb, a subclass that may do more\)$"):
        convert_batchrenorm(nn.Sequential(Ludvb(3)))


def test_pruned_layers_of_torchrl_are_converted() -> None:
    theirs = randomised(torchrl_layer(3, warmup_steps=0))
    ours = copy.deepcopy(theirs)
    for layer in (theirs, ours):
        prune.l1_unstructured(layer, "weight", 1)
    ours = convert_batchrenorm(nn.Sequential(ours))[0]
    x = torch.randn(8, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    assert (ours.weight == 0).sum() == 1


def test_a_second_call_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "triton_brn"):
        net = convert_batchrenorm(nn.Sequential(torchrl_layer(3)))
    assert caplog.messages == [
        "convert_batchrenorm: 1 converted (1 torchrl's BatchRenorm1d to BatchRenorm1d)"
    ]
    layer = net[0]
    assert convert_batchrenorm(net) is net
    assert net[0] is layer


@pytest.mark.parametrize("layer", [torchrl_layer, stable_baselines_layer, BatchRenorm2D])
def test_statistics_in_half_precision_become_float32(layer: Any) -> None:
    net = nn.Sequential(layer(3)).half()
    weight = next(net.parameters())
    convert_batchrenorm(net)
    assert (net[0].running_mean.dtype, net[0].running_var.dtype) == (torch.float32, torch.float32)
    assert net[0].weight is weight
    shape = (4, 3, 2, 2) if layer is BatchRenorm2D else (4, 3)
    assert net(torch.randn(shape).half()).dtype == torch.half
