"""Plain PyTorch alone: the ways that it has for large inputs, and where each must not be taken."""

from __future__ import annotations

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    inputs,
    lay_out,
    reference_gradients,
    sum_scales,
)

from triton_brn import BatchRenorm1d, batch_renorm, passes

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    "shape", [(4, 9, 48, 48), (1, 3, 160, 160), (30, 30, 75), (2, 9, 16, 16, 16), (80, 30, 7, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.0, 0.0)])
def test_large_maps(shape: tuple[int, ...], dtype: torch.dtype, limits: tuple[float, float]) -> None:
    """Plain PyTorch takes the moments of contiguous ones plane by plane, and merges them."""
    case, (r_max, d_max) = inputs(shape, dtype), limits
    case.x[:, 1] = 0  # a constant channel
    case.x[-1, 2] += 7  # a plane far from the others
    before = case.running_mean.clone(), case.running_var.clone()
    truth = batch_renorm_reference(*case.args, r_max=r_max, d_max=d_max)
    assert passes.has_planes(case.x)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=True, r_max=r_max, d_max=d_max)
    grads = torch.autograd.grad(y, leaves, case.dy)
    assert_accurate(y, truth.y)
    assert_accurate(case.running_mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(case.running_var, truth.running_var)
    options = {"r_max": r_max, "d_max": d_max}
    expected = reference_gradients(case.dy, case.x, *before, case.weight, case.bias, **options)
    scales = (None, *sum_scales(case.dy, case.x, *before, **options))
    for grad, value, scale in zip(grads, expected, scales, strict=True):
        assert_accurate(grad, value, scale=scale)


def test_large_maps_that_are_bad_or_far() -> None:
    x = torch.randn(4, 9, 48, 48)
    x[1, 1, 2, 2], x[2, 2, 3, 3], x[:, 3] = float("nan"), float("inf"), x[:, 3] * 1e-2 + 1e4
    x[:, 4] = 0.5
    mean, var = torch.zeros(9), torch.ones(9)
    truth = batch_renorm_reference(x, mean, var)
    y = batch_renorm(x, mean, var, training=True)
    assert_accurate(y, truth.y)
    assert_accurate(mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(var, truth.running_var)
    assert mean[1] == mean[2] == 0
    assert var[1] == var[2] == 1


# Rows and maps whose running sums would be long: on both sides of what plain PyTorch decides by, with rows
# and elements left over, few and many channels. The second is the layout.
LONG = [
    ((512, 6), "contiguous"),
    ((513, 6), "contiguous"),
    ((1031, 70), "contiguous"),
    ((700, 1100), "contiguous"),
    ((200_003, 2), "contiguous"),
    ((131_101, 5), "contiguous"),
    ((9000, 64), "contiguous"),
    ((100_000, 1, 1), "contiguous"),
    ((3, 40, 73, 75), "channels_last"),
    ((2, 130, 61, 67), "channels_last"),
    ((2, 3, 29, 31, 33), "channels_last"),
    ((2, 3, 4097), "contiguous"),
    ((2, 3, 10_007), "contiguous"),
    ((1, 2, 149, 149), "contiguous"),
    ((2, 2, 24, 26, 28), "contiguous"),
]
GRADIENTS = {
    "random": lambda x: torch.randn_like(x),
    "one number": lambda x: torch.full_like(x, 0.1),
    "a number a channel": lambda x: torch.rand(x.shape[1]).view(1, -1, *[1] * (x.ndim - 2)).expand_as(x) + 0,
    "half of them 0.1": lambda x: (x > x.mean()) * 0.1,
    "of a mean": lambda x: x[(slice(None),) * 2 + (slice(1),) * (x.ndim - 2)].expand_as(x) + 0,
    "x": lambda x: x.clone(),
    "positive": lambda x: torch.rand_like(x),
}


EQUAL = ("one number", "a number a channel", "half of them 0.1", "of a mean")  # all rounded the same way


@pytest.mark.parametrize(("shape", "layout"), LONG, ids=str)
def test_long_sums(shape: tuple[int, ...], layout: str) -> None:
    """Mean, variance, y, dx and both sums within 2e-6; gradients that consist of equal numbers, 4e-6."""
    case = inputs(shape, layout=layout)
    before = case.running_mean.clone(), case.running_var.clone()
    truth = batch_renorm_reference(*case.args, momentum=1.0)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=True, momentum=1.0)
    assert_accurate(y, truth.y)
    assert_accurate(case.running_mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(case.running_var, truth.running_var)
    column = (1, -1, *[1] * (y.ndim - 2))
    axes = [0, *range(2, y.ndim)]
    x = case.x.detach().double()
    std = x.std(axes, correction=0) + 1e-5
    xn = (x - x.mean(axes, keepdim=True)) / std.view(column)
    for name, make in GRADIENTS.items():
        dy = lay_out(make(case.x.detach()), layout)
        grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        expected = reference_gradients(dy, case.x, *before, case.weight, case.bias)
        # dx is slope (dy - mean(dy) - xn mean(dy xn)): these give the scale where little is left of them.
        terms = 2 * dy.abs().amax(axes) + xn.abs().amax(axes) * (dy * xn).abs().mean(axes)
        slope = (case.weight.double() * truth.r / std).abs()
        scales = ((slope * terms).view(column), *sum_scales(dy, case.x, *before))
        tolerance = 8e-6 if name in EQUAL and len(y) == 512 else 4e-6 if name in EQUAL else 2e-6
        for what, grad, value, scale in zip(("dx", "dweight", "dbias"), grads, expected, scales, strict=True):
            try:
                assert_accurate(grad, value, tolerance, scale=scale)
            except AssertionError as error:
                raise AssertionError(f"{name}: {what}: {error}") from None


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual.double() - expected).abs() / expected.abs()).max())


def test_two_million_rows_far_from_zero() -> None:
    x = torch.randn(2_000_000, 2) + 100
    layer = BatchRenorm1d(2, momentum=1.0, r_max=1.0, d_max=0.0)
    y = layer(x)
    mean, var = x.double().mean(0), x.double().var(0, correction=0)
    assert relative(layer.running_mean, mean) < 1e-7
    assert relative(layer.running_var, var) < 2e-6
    assert_accurate(y, (x.double() - mean) / (var + 1e-5).sqrt())


def test_twenty_million_ones() -> None:
    """A running float32 sum of them stops at 16,777,216."""
    for shape in ((20_000_000, 1), (2, 1, 10_000_019)):
        x = torch.zeros(shape)
        x.view(-1)[::2] = 1
        bias = torch.zeros(1, requires_grad=True)
        y = batch_renorm(x, torch.zeros(1), torch.ones(1), None, bias, training=True)
        for dy in (torch.ones_like(x), torch.ones(()).expand_as(x)):
            (dbias,) = torch.autograd.grad(y, bias, dy, retain_graph=True)
            assert relative(dbias, torch.tensor(x.numel())) < 1e-7


@pytest.mark.parametrize(
    ("shape", "layout"), [((1, 8, 64, 64, 64), "channels_last"), ((32, 64, 56, 56), "channels_last")]
)
def test_the_variance_of_many_rows(shape: tuple[int, ...], layout: str) -> None:
    x = lay_out(torch.randn(shape) * 2 + 3, layout)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    batch_renorm(x, mean, var, training=True, momentum=1.0)
    x = x.movedim(1, 0).flatten(1)
    exact = (
        torch.stack([c.double().mean() for c in x]),
        torch.stack([c.double().var(correction=0) for c in x]),
    )
    assert relative(mean, exact[0]) < 5e-7
    assert relative(var, exact[1]) < 2e-6


@pytest.mark.parametrize("affine", [True, False])
def test_no_eps(affine: bool) -> None:
    """A constant channel then has no y; its running variance falls, with a gradient or without."""
    for requires_grad in (True, False):
        layer = BatchRenorm1d(2, eps=0.0, affine=affine).requires_grad_(requires_grad)
        x = torch.stack((torch.full((8,), 2.0), torch.randn(8)), 1)
        assert layer(x)[:, 0].isnan().all()
        assert layer.running_var[0] == pytest.approx(0.99**2)
