"""Conversion changes all or nothing, and who holds a layer, its tensors or its hooks goes on holding them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from triton_brn import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenormAct2d,
    convert_batchnorm,
    revert_to_batchnorm,
)

pytestmark = pytest.mark.usefixtures("eager")

PLAIN: dict[str, Any] = {"r_max": 1.0, "d_max": 0.0, "momentum": 0.1, "running_average": "var"}  # BatchNorm


def there(net: nn.Module) -> nn.Module:
    return convert_batchnorm(net, **PLAIN)


def there_and_back(net: nn.Module) -> nn.Module:
    return revert_to_batchnorm(there(net))


each_way = pytest.mark.parametrize("way", [there, there_and_back])
Way = Callable[[nn.Module], nn.Module]


def inside(way: Way, layer: nn.Module) -> Any:
    return way(nn.Sequential(nn.Identity(), layer))[1]


def itself(way: Way, layer: nn.Module) -> Any:
    return way(layer)


each_place = pytest.mark.parametrize("place", [inside, itself])


def trained(norm: nn.Module) -> nn.Module:
    for _ in range(3):
        norm(torch.randn(6, 3, 4, 4) * 2 + 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@each_way
def test_a_layer_stays_the_same_object_wherever_it_is_held(way: Way) -> None:
    norm = nn.BatchNorm2d(3)
    net = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.ModuleList([norm]), "c": nn.Conv2d(3, 3, 1)})
    net.held = [norm]
    net["c"].norm = norm
    way(net)
    expected = BatchRenorm2d if way is there else nn.BatchNorm2d
    assert {type(m) for m in (net["a"][0], net["b"][0], net.held[0], net["c"].norm)} == {expected}
    assert net["a"][0] is net["b"][0] is net.held[0] is net["c"].norm is norm


@each_way
def test_a_converted_model_keeps_its_layers_attributes_and_nothing_else(way: Way) -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.weight.requires_grad_(False)
    norm.mine = mine = object()
    before = dict(vars(norm))
    way(nn.Sequential(norm))
    assert norm.mine is mine
    assert (norm.training, norm.weight.requires_grad, norm.bias.requires_grad) == (False, False, True)
    if way is there_and_back:
        assert set(vars(norm)) == set(before)
        assert all(vars(norm)[name] == value for name, value in before.items())


@each_way
@each_place
def test_tensors_stay_the_same_objects(way: Way, place: Callable[[Way, nn.Module], Any]) -> None:
    norm = trained(nn.BatchNorm2d(3))
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    new = place(way, norm)
    assert {**dict(new.named_parameters()), **dict(new.named_buffers())} == tensors
    assert (new is norm) == (place is inside)


@each_way
def test_a_layer_by_itself_is_left_and_gets_a_twin(way: Way) -> None:
    norm = nn.BatchNorm2d(3).half()
    stats = norm.running_var
    new = way(norm)
    assert type(norm) is nn.BatchNorm2d
    assert norm.running_var is stats
    assert stats.dtype == torch.half
    new.mine = 1
    assert not hasattr(norm, "mine")
    new.weight = None
    assert norm.weight is not None


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


@each_way
def test_an_optimizer_goes_on(way: Way) -> None:
    net, other = small(), small()
    x = torch.randn(4, 3, 5, 5)
    for model in (net, other):
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for step in range(4):
            if model is net and step == 2:
                way(net)
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-4)


@each_way
@each_place
def test_hooks_of_every_kind_are_kept_and_their_handles_work(
    way: Way, place: Callable[[Way, nn.Module], Any]
) -> None:
    norm, calls = nn.BatchNorm2d(3), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(name)

    handles = [
        norm.register_forward_pre_hook(note("pre")),
        norm.register_forward_pre_hook(note("pre kwargs"), with_kwargs=True),
        norm.register_forward_hook(note("post")),
        norm.register_forward_hook(note("post kwargs"), with_kwargs=True),
        norm.register_forward_hook(note("always"), always_call=True),
        norm.register_full_backward_pre_hook(note("backward pre")),
        norm.register_full_backward_hook(note("backward")),
        norm.register_state_dict_pre_hook(note("state pre")),
        norm.register_state_dict_post_hook(note("state")),
        norm.register_load_state_dict_post_hook(note("load")),
    ]
    new = place(way, norm)
    new(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match="4D input"):
        new(torch.randn(2, 3))
    new.load_state_dict(new.state_dict())
    first = ["pre", "pre kwargs", "post", "post kwargs", "always", "backward pre", "backward"]
    assert calls == [*first, "pre", "pre kwargs", "always", "state pre", "state", "load"]
    for handle in handles:
        handle.remove()
    new(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    new.load_state_dict(new.state_dict())
    assert len(calls) == 13


@each_way
@each_place
def test_a_load_hook_is_given_the_layer_that_loads(way: Way, place: Callable[[Way, nn.Module], Any]) -> None:
    norm, given = nn.BatchNorm2d(3), []
    norm.register_load_state_dict_pre_hook(lambda module, *_: given.append(module))
    new = place(way, norm)
    del norm
    new.load_state_dict(new.state_dict())
    assert given == [new]


@each_way
@each_place
def test_pruned_layers_stay_pruned(way: Way, place: Callable[[Way, nn.Module], Any]) -> None:
    norm = trained(nn.BatchNorm2d(3))
    prune.l1_unstructured(norm, "weight", 1)
    x = torch.randn(4, 3, 5, 5)
    expected = norm.eval()(x)
    new = place(way, norm)
    torch.testing.assert_close(new(x), expected)
    new(x).sum().backward()
    assert new.weight_orig.grad is not None
    assert [name for name, _ in new.named_parameters()] == ["bias", "weight_orig"]
    prune.remove(new, "weight")
    assert (new.weight == 0).sum() == 1
    torch.testing.assert_close(new(x), expected)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


@each_way
@each_place
def test_parametrizations_are_kept(way: Way, place: Callable[[Way, nn.Module], Any]) -> None:
    norm = trained(nn.BatchNorm2d(3))
    parametrize.register_parametrization(norm, "weight", Doubled())
    x = torch.randn(4, 3, 5, 5)
    expected = norm.eval()(x)
    new = copy.deepcopy(place(way, norm))
    kind = BatchRenorm2d if way is there else nn.BatchNorm2d
    assert isinstance(new, kind)
    assert parametrize.type_before_parametrizations(new) is kind
    torch.testing.assert_close(new(x), expected)
    with torch.no_grad():
        new.parametrizations.weight.original.mul_(0)
    assert (new.weight == 0).all()
    new.weight = torch.ones(3)
    assert (new.parametrizations.weight.original == 0.5).all()
    parametrize.remove_parametrizations(new, "weight")
    assert type(new) is kind
    assert isinstance(new.weight, nn.Parameter)


def test_weight_norm_of_the_convolution_beside_it_is_no_matter() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    expected = net(x)
    torch.testing.assert_close(there(net)(x), expected)


def snapshot(net: nn.Module) -> list[Any]:
    return [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in net.modules()]


class NoEps(nn.BatchNorm2d):
    """Of a class of the user's, without an attribute that is needed."""

    def __init__(self) -> None:
        super().__init__(3)
        del self.eps


def failing(layer: nn.Module) -> nn.Module:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("second", "arguments", "error"),
    [
        (nn.BatchNorm2d(3), {"r_max": 0.5}, r"^r_max: "),
        (nn.BatchNorm2d(3), {"momentum": 2}, r"^momentum: "),
        (nn.BatchNorm2d(3), {"running_average": "mean"}, r"^running_average: "),
        (nn.BatchNorm2d(3), {"rmax": 3.0}, r"expected the options .*, got rmax$"),
        (nn.BatchNorm2d(3), {"eps": 3.0, "device": "cpu"}, r"expected the options .*, got device, eps$"),
        (nn.BatchNorm2d(3, eps=-1.0), {}, r"^eps: .*, for 1$"),
        (nn.BatchNorm2d(3, momentum=-1.0), {}, r"^momentum: .*, for 1$"),
        (NoEps(), {"classes": {NoEps: BatchRenorm2d}}, r"^classes: .* got NoEps without eps for 1$"),
        (
            nn.Conv2d(3, 3, 1),
            {"classes": {nn.Conv2d: BatchRenorm2d}},
            r"^classes: .* got Conv2d without runn",
        ),
        (nn.Conv2d(3, 3, 1), {"classes": {nn.Conv2d: failing}}, r"^no$"),
        (nn.Conv2d(3, 3, 1), {"classes": {nn.Conv2d: lambda _: None}}, r"^classes: .* NoneType for 1$"),
        (nn.Conv2d(3, 3, 1), {"classes": {nn.Conv2d: nn.BatchNorm2d}}, r"^classes: expected classes and"),
        (nn.Conv2d(3, 3, 1), {"classes": {"Conv2d": BatchRenorm2d}}, r"^classes: expected classes and"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(second: nn.Module, arguments: Any, error: str) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), second, nn.BatchNorm2d(4).half())
    before = snapshot(net)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
        convert_batchnorm(net, **arguments)
    assert snapshot(net) == before


def test_an_error_leaves_the_model_as_it_was_on_the_way_back() -> None:
    net = nn.Sequential(BatchRenorm1d(3), BatchRenormAct2d(3))
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"^momentum: "):
        revert_to_batchnorm(net, momentum=2.0)
    assert snapshot(net) == before


def test_tensors_that_layers_share_stay_shared() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).half()
    net[1].weight, net[1].running_mean = net[0].weight, net[0].running_mean
    there(net)
    assert net[0].weight is net[1].weight
    assert net[0].running_mean is net[1].running_mean
    assert net[0].running_mean.dtype == torch.float32


def test_the_random_numbers_go_on() -> None:
    state = torch.random.get_rng_state()
    there(nn.Sequential(BatchRenormAct2d(3), nn.BatchNorm2d(3)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_converted_model_can_be_copied_and_pickled() -> None:
    net = there(nn.Sequential(trained(nn.BatchNorm2d(3)), nn.SyncBatchNorm(3)))
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(net)(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(m) for m in other] == [BatchRenorm2d] * 2
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
