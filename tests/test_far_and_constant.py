"""Plain PyTorch: channels far from zero, constant ones, momentum 0, and threads that share a layer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    inference_reference,
    lay_out,
    reference_gradients,
    sum_scales,
)

from triton_brn import BatchRenorm1d, BatchRenorm2d, batch_renorm

pytestmark = pytest.mark.usefixtures("eager")

#: Each way that plain PyTorch has, small and large.
WAYS = [
    ((300, 5), "contiguous"),
    ((8192, 64), "contiguous"),
    ((7, 5, 40), "contiguous"),
    ((4, 5, 9, 9), "contiguous"),
    ((4, 9, 48, 48), "contiguous"),
    ((2, 5, 70, 70), "contiguous"),
    ((4, 5, 9, 9), "channels_last"),
    ((4, 64, 48, 48), "channels_last"),
    ((2, 5, 9, 9, 9), "channels_last"),
    ((2, 3, 20, 30, 31), "gaps"),
]


@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
@pytest.mark.parametrize("ratio", [4.0, 6.0, 30.0, 900.0, 1e4, 1e6])
def test_far_channels(shape: tuple[int, ...], layout: str, ratio: float) -> None:
    """y, dx and the sums as near zero; here one channel is far, then all."""
    column = (1, -1, *[1] * (len(shape) - 2))
    for far in (torch.arange(shape[1]) == 1, torch.ones(shape[1], dtype=torch.bool)):
        x = lay_out(torch.randn(shape) + (ratio * far).view(column), layout)
        mean, var = ratio * far + torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
        weight, bias = torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()
        truth = batch_renorm_reference(x, mean, var, weight, bias)
        before = mean.clone(), var.clone()
        leaf = x.detach().requires_grad_()
        y = batch_renorm(leaf, mean, var, weight, bias, training=True)
        assert_accurate(y, truth.y)
        assert_accurate(mean, truth.running_mean, 1e-6, scale=truth.running_mean.abs() + 1)
        assert_accurate(var, truth.running_var)
        dy = torch.randn(shape)
        grads = torch.autograd.grad(y, (leaf, weight, bias), dy)
        expected = reference_gradients(dy, x, *before, weight, bias)
        for grad, value, scale in zip(grads, expected, (None, *sum_scales(dy, x, *before)), strict=True):
            assert_accurate(grad, value, scale=scale)


@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(shape: tuple[int, ...], layout: str, offset: float, dtype: torch.dtype) -> None:
    x = lay_out((torch.randn(shape) * (1 if offset < 1e4 else 30) + offset).to(dtype), layout)
    mean, var = torch.randn(shape[1]) + offset, torch.rand(shape[1]) + 0.5
    truth = batch_renorm_reference(x, mean, var)
    before = mean.clone(), var.clone()
    leaf = x.detach().requires_grad_()
    y = batch_renorm(leaf, mean, var, training=True)
    tolerance = 4e-6 if offset == 1e4 else None  # there are few numbers: many are equal
    assert_accurate(y, truth.y, tolerance)
    assert_accurate(var, truth.running_var, tolerance)
    dy = torch.randn(shape).to(dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert_accurate(dx, reference_gradients(dy, x, *before)[0], tolerance)
    assert dx.stride() == torch.empty_like(x).stride()
    assert_accurate(batch_renorm(x, *before), inference_reference(x, *before))


@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
@pytest.mark.parametrize("far", ["one", "all"])
def test_inference_far_from_zero(shape: tuple[int, ...], layout: str, far: str) -> None:
    """y = (x - mu) / sigma, not x / sigma - mu / sigma: at 1e4 +- 1e-2 that was 2 % off."""
    at = torch.full((shape[1],), 1e4) if far == "all" else (torch.arange(shape[1]) == 1) * 1e4
    column = (1, -1, *[1] * (len(shape) - 2))
    x = lay_out(torch.randn(shape) * 1e-2 + at.view(column), layout).requires_grad_()
    mean, var = at + torch.randn(shape[1]) * 1e-2, torch.full((shape[1],), 1e-4)
    weight, bias = torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()
    with torch.no_grad():
        assert_accurate(
            batch_renorm(x, mean, var, weight, bias), inference_reference(x, mean, var, weight, bias)
        )
    y = batch_renorm(x, mean, var, weight, bias)
    assert_accurate(y, inference_reference(x, mean, var, weight, bias))
    dy = torch.randn(shape)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    expected = reference_gradients(dy, x, mean, var, weight, bias, training=False)
    scales = (None, *sum_scales(dy, x, mean, var, training=False))
    for grad, value, scale in zip(grads, expected, scales, strict=True):
        assert_accurate(grad, value, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_mean_of_far_channels(layout: str) -> None:
    """It takes what rounding left of the mean, too, or inference is off by as much."""
    x = lay_out(torch.randn(32, 64, 56, 56) + 1e4, layout)
    layer = BatchRenorm2d(64, momentum=1.0)
    layer(x)
    mean = x.double().mean((0, 2, 3))
    assert_accurate(layer.running_mean, mean, 6e-8)
    y = layer.eval()(x)
    assert_accurate(y, inference_reference(x, layer.running_mean, layer.running_var))
    assert y.mean((0, 2, 3)).abs().max() < 1e-3  # a float32 at 1e4 has steps of 1e-3


@pytest.mark.parametrize("value", [0.1, 1e10, -3e4, 1e-15, 0.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
def test_constant_channels_give_beta(shape: tuple[int, ...], layout: str, value: float, eps: float) -> None:
    x = torch.randn(shape)
    x[:, 1] = value
    x = lay_out(x, layout)
    bias = torch.randn(shape[1])
    for limits, beta in (((1.0, 0.0), None), ((1.0, 0.0), bias), ((3.0, 5.0), bias)):
        mean, var = torch.full((shape[1],), value), torch.zeros(shape[1])
        options = {"eps": eps, "r_max": limits[0], "d_max": limits[1]}
        y = batch_renorm(x, mean, var, None, beta, training=True, **options)
        assert (y[:, 1] == (0 if beta is None else bias[1])).all()
        assert mean[1] == torch.tensor(value)
        assert var[1] <= 1e-12
    assert (batch_renorm(x, torch.full((shape[1],), value), torch.zeros(shape[1]), eps=eps)[:, 1] == 0).all()


def test_constant_half_precision() -> None:
    x = torch.full((2, 1), 1e4, dtype=torch.half)
    assert (batch_renorm(x, torch.zeros(1), torch.ones(1), training=True, d_max=0.0) == 0).all()


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("limits", [(1.0, 0.0), (3.0, 5.0)])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_momentum_0_changes_no_bit(average: str, limits: tuple[float, float], requires_grad: bool) -> None:
    """The running variance is no square of its root. The batch counts nevertheless."""
    for x in (torch.randn(64, 1000), torch.randn(64, 1000) + 1e4, torch.randn(2, 1000, 8, 8)):
        mean, var, step = torch.randn(1000), torch.rand(1000) * 3, torch.tensor(3)
        before = mean.clone(), var.clone()
        options = {"r_max": limits[0], "d_max": limits[1], "running_average": average}
        x.requires_grad_(requires_grad)
        batch_renorm(x, mean, var, training=True, momentum=0.0, num_batches_tracked=step, **options)
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        assert step == 4


def test_an_expanded_gradient_is_no_worse_than_in_batch_norm() -> None:
    """As ``.sum()`` and ``.mean()`` give it."""
    for shape, layout in WAYS:
        x = lay_out(torch.randn(shape), layout).requires_grad_()
        theirs = torch.ones(shape[1]).requires_grad_(), torch.zeros(shape[1]).requires_grad_()
        y = batch_renorm(x, torch.zeros(shape[1]), torch.ones(shape[1]), *theirs, training=True)
        z = torch.nn.functional.batch_norm(x, None, None, *theirs, training=True)
        rows = torch.randn(shape[0], shape[1], *[1] * (len(shape) - 2))
        for dy in (torch.full((), 0.1).expand(shape), rows.expand(shape)):
            exact = dy.double().sum([0, *range(2, len(shape))])
            ours, other = (torch.autograd.grad(out, theirs[1], dy, retain_graph=True)[0] for out in (y, z))
            scale = dy.double().abs().sum([0, *range(2, len(shape))])
            assert ((ours - exact).abs() / scale).max() <= ((other - exact).abs() / scale).max() + 6e-8


@pytest.mark.parametrize("requires_grad", [True, False])
def test_threads_that_share_a_layer_count_every_batch(requires_grad: bool) -> None:
    layer = BatchRenorm1d(8, momentum=0.5).requires_grad_(requires_grad)
    x = torch.ones(4, 8) * 3
    x[::2] = 1

    def run(_: int) -> None:
        for _ in range(100):
            layer(x)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert layer.num_batches_tracked == 800
    torch.testing.assert_close(layer.running_mean, torch.full((8,), 2.0))
    torch.testing.assert_close(layer.running_var, torch.ones(8))
