"""Plain PyTorch alone: the ways that it has for large inputs, and where each must not be taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    inference_reference,
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
    ((2, 2, 181, 182), "contiguous"),
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
    assert relative(mean, exact[0]) < 1e-6
    assert relative(var, exact[1]) < 2e-6


@pytest.mark.parametrize("affine", [True, False])
def test_no_eps(affine: bool) -> None:
    """A constant channel then has no y; its running variance falls, with a gradient or without."""
    for requires_grad in (True, False):
        layer = BatchRenorm1d(2, eps=0.0, affine=affine).requires_grad_(requires_grad)
        x = torch.stack((torch.full((8,), 2.0), torch.randn(8)), 1)
        assert layer(x)[:, 0].isnan().all()
        assert layer.running_var[0] == pytest.approx(0.99**2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3000, 40), "contiguous"),
        ((20_000, 40), "contiguous"),
        ((2, 9, 80, 80), "contiguous"),
        ((4, 64, 48, 48), "channels_last"),
    ],
    ids=str,
)
def test_a_bad_channel_beside_good_ones(shape: tuple[int, ...], layout: str, far: float, bad: float) -> None:
    """Wherever channels lie side by side in what is summed or merged."""
    x = lay_out(torch.randn(shape) + far, layout)
    x[(1, 1) + (2,) * (len(shape) - 2)] = bad
    mean, var = torch.randn(shape[1]) + far, torch.rand(shape[1]) + 0.5
    before = mean.clone(), var.clone()
    truth = batch_renorm_reference(x, mean, var)
    x.requires_grad_()
    y = batch_renorm(x, mean, var, training=True)
    (dx,) = torch.autograd.grad(y, x, dy := torch.randn(shape))
    good = torch.arange(shape[1]) != 1
    assert y[:, 1].isnan().all()
    assert dx[:, 1].isnan().all()
    assert (mean[1], var[1]) == (before[0][1], before[1][1])
    assert_accurate(y[:, good], truth.y[:, good])
    assert_accurate(var[good], truth.running_var[good])
    kept = (v[good] for v in before)
    assert_accurate(dx[:, good], reference_gradients(dy[:, good], x[:, good], *kept)[0])


def odd_inputs() -> dict[str, torch.Tensor]:
    draw = torch.randn
    return {
        "six axes": draw(2, 3, 8, 9, 16, 17),
        "seven axes, large maps": draw(1, 2, 3, 5, 13, 17, 19),
        "expanded over N": draw(1, 5, 40, 40).expand(4, 5, 40, 40),
        "expanded over C": draw(600, 1).expand(600, 7),
        "expanded over maps": draw(6, 5, 1, 1).expand(6, 5, 9, 9),
        "(N, L, C)": draw(8, 4000, 16).transpose(1, 2),
        "some channels": draw(64, 20, 9, 9)[:, 3:9],
        "a window": draw(4, 5, 99, 99)[:, :, 3:80, 5:],
        "a map of one element": draw(600, 9, 1, 1),
        "one channel in channels_last": lay_out(draw(20, 1, 70, 70), "channels_last"),
        "one line in channels_last": lay_out(draw(4, 70, 1, 3000), "channels_last"),
        "an outlier first": torch.cat((torch.full((1, 3), 1e6), draw(99_999, 3))),
        "constant but for the first": torch.cat((torch.full((1, 3), 5.0001), torch.full((99_999, 3), 5.0))),
        "two values": (draw(200_000, 4) > 0) * 1.0 + 1000,
        "rising": torch.arange(600_000.0).view(-1, 3),
        "behind a ReLU": lay_out(draw(32, 64, 30, 30).relu(), "channels_last"),
        "seldom not 0": (draw(40_000, 20) > 2.5) * draw(40_000, 20),
        "few values": torch.randint(0, 4, (40_000, 20)).float(),
        "tiny": draw(5000, 4) * 1e-18 + 1e-15,
    }


@pytest.mark.parametrize("name", odd_inputs())
def test_odd_inputs(name: str) -> None:
    x = odd_inputs()[name]
    channels, axes = x.shape[1], [0, *range(2, x.ndim)]
    var = x.var(axes) * (torch.rand(channels) + 0.5)
    mean = x.mean(axes) + torch.randn(channels) * var.sqrt()
    before = mean.clone(), var.clone()
    truth = batch_renorm_reference(x, mean, var)
    leaf = x.detach().requires_grad_()
    y = batch_renorm(leaf, mean, var, training=True)
    assert_accurate(y, truth.y)
    assert_accurate(mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(var, truth.running_var, scale=truth.running_var + 1e-5)
    dy = torch.randn(x.shape)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert_accurate(dx, reference_gradients(dy, x, *before)[0])
    assert_accurate(batch_renorm(x, *before), inference_reference(x, *before))


@pytest.mark.parametrize(
    "make",
    {
        "permuted": lambda: torch.randn(48, 9, 48, 4).permute(3, 1, 2, 0),
        "expanded over N": lambda: torch.randn(1, 9, 48, 48).expand(4, 9, 48, 48),
        "expanded over C": lambda: torch.randn(4, 1, 48, 48).expand(4, 9, 48, 48),
        "expanded over maps": lambda: torch.randn(4, 9, 1, 1).expand(4, 9, 48, 48),
        "contiguous": lambda: torch.randn(4, 9, 48, 48),
        "channels_last": lambda: lay_out(torch.randn(4, 9, 48, 48), "channels_last"),
    }.values(),
)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_any_layout(make: Callable[[], torch.Tensor], training: bool) -> None:
    for layout in ("contiguous", "channels_last"):
        case, dy = inputs((4, 9, 48, 48), layout=layout), make()
        before = case.running_mean.clone(), case.running_var.clone()
        leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
        grads = torch.autograd.grad(batch_renorm(*case.args, training=training), leaves, dy)
        affine = case.weight, case.bias
        expected = reference_gradients(dy, case.x, *before, *affine, training=training)
        scales = (None, *sum_scales(dy, case.x, *before, training=training))
        for grad, value, scale in zip(grads, expected, scales, strict=True):
            assert_accurate(grad, value, scale=scale)
