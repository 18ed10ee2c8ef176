"""Running statistics under torch.func: updated once, by constants, or not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from members import DERIVATIVES, DOUBLE, assert_same, members
from reference import assert_accurate, batch_renorm_reference, inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    vmap,
)

from triton_brn import batch_renorm


@pytest.mark.parametrize(
    "name", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "forward over forward"]
)
@pytest.mark.parametrize("captured", [True, False])
def test_statistics_are_updated_once(captured: bool, name: str, backend: str) -> None:
    """In place, by constants, whether the differentiated function captures them or takes them."""
    (layer,), (other,) = members(1), members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    buffers = dict(layer.named_buffers())

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = layer(x) if captured else functional_call(layer, buffers, (x,))
        return (y * weight + bias).pow(3).sum()

    DERIVATIVES[name](loss)(x, layer.weight.detach().clone(), layer.bias.detach().clone())
    other(x)
    assert_same(list(layer.buffers()), list(other.buffers()))
    assert layer.num_batches_tracked == other.num_batches_tracked
    for b in layer.buffers():
        assert type(b) is Tensor
        assert not b.requires_grad
        assert any(b is v for v in state.values())


def test_statistics_passed_through_transforms(backend: str) -> None:
    """As arguments of a function that is differentiated twice, and of one with tangents."""
    x = torch.randn(5, 3, dtype=DOUBLE)
    (expected,) = members(1)
    expected(x)
    (layer,) = members(1)

    def loss(x: Tensor, buffers: Any) -> Tensor:
        return functional_call(layer, buffers, (x,)).pow(3).sum()

    for transform in (grad(lambda x, b: grad(loss)(x, b).pow(2).sum()), hessian(loss)):
        buffers = {n: b.clone() for n, b in layer.named_buffers()}
        transform(x, buffers)
        assert_same(list(buffers.values()), list(expected.buffers()))


def test_what_is_dual_leaves_no_tangent_in_the_statistics(backend: str) -> None:
    (layer,) = members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
        assert all(
            forward_ad.unpack_dual(b).tangent is None for b in layer.buffers() if b.is_floating_point()
        )
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_exact(dtype: torch.dtype, momentum: float | None, average: str, eager: None) -> None:
    """Far channels, bad ones, constant ones; momentum=0 leaves every bit."""
    case = inputs((64, 9, 3), dtype)
    case.x[:, 1] = case.x[:, 1] * 1e-2 + (1e4 if dtype == torch.float32 else 0.5)
    case.x[3, 2, 1], case.x[5, 4, 0], case.x[:, 5], case.x[:, 6] = float("nan"), float("inf"), 0.1, 1e10
    before = case.running_mean.clone(), case.running_var.clone()
    options = {"momentum": momentum, "running_average": average}
    truth = batch_renorm_reference(*case.args, momentum=momentum, average=average, step=3)
    y = vmap(lambda *a: batch_renorm(*a[:5], training=True, num_batches_tracked=a[5], **options))(
        *(t[None] for t in (*case.args, torch.tensor(3)))
    )
    assert_accurate(y[0], truth.y)
    if momentum == 0:
        assert torch.equal(case.running_mean, before[0])
        assert torch.equal(case.running_var, before[1])
    assert_accurate(case.running_mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(case.running_var, truth.running_var)


def test_a_channel_that_overflows_keeps_its_statistics(eager: None) -> None:
    (layer,) = members(1)
    layer.float()
    before = copy.deepcopy(layer)
    x = torch.randn(5, 3)
    x[:, 1] *= 1e25
    grad(lambda x: layer(x)[:, 0].sum())(x)
    for now, then in zip(layer.buffers(), before.buffers(), strict=True):
        assert (now != then).tolist() == ([True, False, True] if now.ndim else True)


def test_bad_input_is_refused_first(backend: str) -> None:
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="input: expected more than 1 value per channel"):
        vmap(layer)(torch.randn(4, 1, 3, dtype=DOUBLE))
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        grad(lambda x: functional_call(layer, {"running_mean": torch.zeros(2)}, (x,)).sum())(
            torch.randn(5, 3)
        )
    with pytest.raises(ValueError, match=r"running_mean: expected .* does not require grad"):
        grad(lambda m: functional_call(layer, {"running_mean": m}, (torch.ones(5, 3, dtype=DOUBLE),)).sum())(
            torch.zeros(3, dtype=DOUBLE)
        )
    assert_same(layer.state_dict(), before, 0)


def test_an_empty_batch(backend: str) -> None:
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    dx, dweight = grad(lambda x, w: functional_call(layer, {"weight": w}, (x,)).sum(), (0, 1))(
        torch.empty(0, 3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    )
    assert dx.shape == (0, 3)
    assert torch.equal(dweight, torch.zeros(3, dtype=DOUBLE))
    assert_same(layer.state_dict(), before, 0)


def test_functionalize(backend: str) -> None:
    (layer,), (other,) = members(1), members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    buffers = {n: b.clone() for n, b in layer.named_buffers()}
    y = functionalize(lambda x, b: functional_call(layer, b, (x,)))(x, buffers)
    assert_same(y, other(x))
    assert_same(list(buffers.values()), list(other.buffers()))


@pytest.mark.parametrize("value", [0.1, 3.3e4, 1e10])
def test_a_channel_that_never_varies_gives_the_bias(value: float, eager: None) -> None:
    """To the bit: what rounding takes from a sum is no deviation."""
    statistics = torch.full((1, 1), value), torch.ones(1, 1)
    bias = torch.tensor([0.7])
    for rows in (7, 49, 1001, 5000):
        x = torch.full((1, rows, 1, 3), value)
        y = vmap(lambda x, m, v: batch_renorm(x, m, v, None, bias, training=True))(x, *statistics)
        assert (y == 0.7).all()
