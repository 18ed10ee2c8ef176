"""Hard numbers: cancellation, constant channels, two values, the ends of fp16, NaN and inf, empty batches."""

from __future__ import annotations

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    error,
    lay_out,
    reference_gradients,
)
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, batch_renorm

pytestmark = pytest.mark.usefixtures("backend")


def far_from_zero(shape: tuple[int, ...], layout: str, device: torch.device) -> Tensor:
    """Mean 1e4, standard deviation 1e-2: a float32 there has steps of 1e-3."""
    return lay_out((torch.randn(shape) * 1e-2 + 1e4).to(device), layout)


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, dx


def no_worse(ours: Tensor, our_truth: Tensor, theirs: Tensor, their_truth: Tensor, backend: str) -> None:
    """Root mean square error, relative to the values, over 64 channels: BatchNorm's own, or less.

    BatchNorm applies x * a + b. Both backends take the mean away first.
    """
    ours, theirs = (
        (t.detach().double().cpu() - truth.cpu()).norm() / truth.cpu().norm()
        for t, truth in ((ours, our_truth), (theirs, their_truth))
    )
    assert ours <= theirs, f"{ours:.2e}, BatchNorm {theirs:.2e}"
    assert ours < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 64, 1, 1), (4, 64, 9, 9)])
def test_a_large_mean_is_no_worse_than_in_batch_norm(shape, layout: str, backend: str, device) -> None:
    x = far_from_zero(shape, layout, device)
    dy = lay_out(torch.randn(shape, device=device), layout)
    theirs = nn.BatchNorm2d(64, momentum=1.0).to(device)
    limits = {"r_max": 1.0, "d_max": 0.0}
    ours = BatchRenorm2d(64, momentum=1.0, running_average="var", **limits).to(device)

    truth = batch_renorm_reference(
        x, ours.running_mean, ours.running_var, **limits, momentum=1.0, average="var"
    )
    dx = reference_gradients(dy, x, ours.running_mean, ours.running_var, **limits)[0]
    (our_y, our_dx), (their_y, their_dx) = run(ours, x, dy), run(theirs, x, dy)
    no_worse(our_y, truth.y, their_y, truth.y, backend)
    no_worse(our_dx, dx, their_dx, dx, backend)
    for name in ("running_mean", "running_var"):
        expected = getattr(truth, name)
        assert error(getattr(ours, name), expected) <= error(getattr(theirs, name), expected) + 1e-7


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_with_correction(layout: str, backend: str, device) -> None:
    """r and d free: y is (x - mu) / sigma, and the rounding of mu_B must not come back through d."""
    x = far_from_zero((4, 64, 9, 9), layout, device)
    mean, var = torch.full((64,), 1e4, device=device), torch.full((64,), 2e-4, device=device)
    truth = batch_renorm_reference(x, mean, var)
    assert 0 < truth.d.abs().max() < 5
    assert truth.r.min() > 1 / 3
    assert truth.r.max() < 1
    theirs = nn.BatchNorm2d(64).to(device)(x)
    their_truth = batch_renorm_reference(x, mean, var, r_max=1.0, d_max=0.0).y
    no_worse(batch_renorm(x, mean, var, training=True), truth.y, theirs, their_truth, backend)


@pytest.mark.parametrize("shape", [(1, 1, 256, 256), (4, 3, 7, 1), (4, 3, 1, 7), (4, 3, 4, 5, 1)])
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.0, 0.0)])
def test_layouts_that_are_two_at_a_time(shape, limits, backend: str, device) -> None:
    """With an axis of size 1, strides may be contiguous and channels_last both: torch's kernels guess."""
    r_max, d_max = limits
    x = lay_out(torch.randn(shape, device=device) + (200 if shape[1] == 1 else 0), "channels_last")
    mean, var = (v * torch.ones(shape[1], device=device) for v in (x.mean(), 1.5))
    options = {"r_max": r_max, "d_max": d_max}
    truth = batch_renorm_reference(x, mean, var, **options)
    for layouts in (("contiguous", "channels_last"), ("channels_last", "channels_last")):
        z, dy = (lay_out(t, layout) for t, layout in zip((x, torch.randn_like(x)), layouts, strict=True))
        dx = reference_gradients(dy, x, mean, var, **options)[0]
        z = z.detach().requires_grad_()
        y = batch_renorm(z, mean.clone(), var.clone(), training=True, **options)
        y.backward(dy)
        assert_accurate(y, truth.y, 1e-5 if shape[1] == 1 else None)
        assert_accurate(z.grad, dx, 1e-5 if shape[1] == 1 else None)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-30])
def test_constant_channels(value: float, backend: str, device) -> None:
    layer = BatchRenorm1d(2, r_max=3.0, d_max=5.0).to(device)
    x = torch.stack((torch.full((8,), value), torch.randn(8)), 1).to(device)
    before = layer.running_mean.clone(), layer.running_var.clone()
    for _ in range(3):
        y, dx = run(layer, x, torch.randn_like(x))
        expected = batch_renorm_reference(x, *before, layer.weight, layer.bias)
        assert_accurate(y, expected.y, scale=expected.y.abs().max())
        assert dx.isfinite().all()
        assert_accurate(layer.running_mean, expected.running_mean)
        assert_accurate(layer.running_var, expected.running_var)
        before = layer.running_mean.clone(), layer.running_var.clone()
    assert y[:, 0].unique().numel() == 1
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 2), (2, 3, 1, 1)])
def test_two_values_per_channel(shape: tuple[int, ...], average: str, device) -> None:
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mean, var = torch.randn(3, device=device) * 0.1, torch.ones(3, device=device)
    expected = batch_renorm_reference(x, mean, var, average=average)
    dx = reference_gradients(dy, x, mean, var)[0]
    z = x.clone().requires_grad_()
    y = batch_renorm(z, mean, var, training=True, running_average=average)
    y.backward(dy)
    assert_accurate(y, expected.y)
    assert_accurate(mean, expected.running_mean)
    assert_accurate(var, expected.running_var)
    # dx is the little that (1 - xn^2) dy / sigma_B leaves of nearly equal terms: they give the scale.
    std = x.double().movedim(1, 0).flatten(1).std(1, correction=0)
    assert_accurate(z.grad, dx, scale=(expected.r / std).max() * dy.abs().max())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [6e4, 6e-8])
def test_the_ends_of_fp16(size: float, layout: str, device) -> None:
    """Sums, squares and statistics are float32: fp16 has no 6e4 squared; 6e-8 is its smallest number."""
    signs = torch.randint(0, 2, (4, 3, 5, 5)) * 2 - 1
    x = lay_out((signs * size).half().to(device), layout)
    x[0] = 0
    dy = torch.randn_like(x)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    expected = batch_renorm_reference(x, mean, var)
    dx = reference_gradients(dy, x, mean, var)[0]
    z = x.detach().requires_grad_()
    y = batch_renorm(z, mean, var, training=True)
    y.backward(dy)
    assert y.isfinite().all()
    assert_accurate(y, expected.y)
    assert_accurate(z.grad, dx)
    assert_accurate(mean, expected.running_mean)
    assert_accurate(var, expected.running_var)
    assert_accurate(
        batch_renorm(x, mean, var),
        (x.double() - mean.view(3, 1, 1)) / (var.double() + 1e-5).sqrt().view(3, 1, 1),
    )


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((8, 3), "contiguous"), ((4, 3, 3, 3), "contiguous"), ((4, 3, 3, 3), "channels_last")],
)
def test_a_bad_value_leaves_its_channels_statistics(
    shape, layout: str, bad: float, average: str, device
) -> None:
    x = lay_out(torch.randn(shape, device=device) + 1, layout)
    x[(1, 1) + (2,) * (len(shape) - 2)] = bad
    mean, var = torch.randn(3, device=device), torch.rand(3, device=device) + 0.5
    step = torch.tensor(3, device=device)
    before = mean.clone(), var.clone()
    expected = batch_renorm_reference(x, mean, var, average=average)
    y = batch_renorm(x, mean, var, training=True, num_batches_tracked=step, running_average=average)
    assert y[:, 1].isnan().all()
    assert_accurate(y[:, ::2], expected.y[:, ::2])
    assert torch.equal(mean[1], before[0][1])
    assert torch.equal(var[1], before[1][1])
    assert_accurate(mean, expected.running_mean)
    assert_accurate(var, expected.running_var)
    assert not torch.equal(mean[::2], before[0][::2])
    assert step.item() == 4


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("limits", [(1.0, 0.0), (3.0, 5.0)])
def test_statistics_that_are_bad_stay_so(limits, bad: float, average: str, backend: str, device) -> None:
    """No batch repairs them, and none makes the others worse."""
    mean, var = torch.zeros(3, device=device), torch.tensor([1.0, bad, 1.0], device=device)
    x = torch.randn(8, 3, device=device) + 1
    expected = batch_renorm_reference(x, mean, var, average=average)
    r_max, d_max = limits
    batch_renorm(x, mean, var, training=True, r_max=r_max, d_max=d_max, running_average=average)
    assert mean[1] == 0
    assert torch.equal(var[1].isnan(), torch.tensor(bad != bad, device=device))
    assert not var[1].isfinite()
    for actual, e in ((mean, expected.running_mean), (var, expected.running_var)):
        assert_accurate(actual[::2], e[::2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 0, 4)])
def test_an_empty_batch(shape: tuple[int, ...], training: bool, device) -> None:
    channels = shape[1]
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device)
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    step = torch.tensor(3, device=device)
    before = mean.clone(), var.clone()
    x = torch.randn(shape, device=device, requires_grad=True)
    y = batch_renorm(x, mean, var, weight, bias, training=training, num_batches_tracked=step)
    for create_graph in (False, True):
        grads = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True, create_graph=create_graph)
        assert y.shape == grads[0].shape == x.shape
        assert grads[1].tolist() == grads[2].tolist() == [0.0] * channels
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert step.item() == 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_sums_to_zero(layout: str, device) -> None:
    """A constant added to a channel changes nothing: r and d are constants of the gradient."""
    x = lay_out(torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device), layout)
    layer = BatchRenorm2d(3, r_max=3.0, d_max=5.0, dtype=torch.float64).to(device)
    dx = run(layer, x, torch.randn_like(x))[1]
    assert dx.sum((0, 2, 3)).abs().max() < 1e-13
    assert dx.abs().max() > 1e-2


def test_the_batchs_own_statistics_give_batch_norm(device) -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device) * 3 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    y = batch_renorm(x, mean.clone(), var.clone(), training=True, r_max=None, d_max=None)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


def test_results_repeat_bit_by_bit(device) -> None:
    x, dy = torch.randn(16, 3, 9, 9, device=device), torch.randn(16, 3, 9, 9, device=device)
    runs = [run(BatchRenorm2d(3, r_max=3.0, d_max=5.0).to(device), x, dy) for _ in range(3)]
    for y, dx in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert torch.equal(dx, runs[0][1])


def test_a_nan_channel_leaves_a_far_one_as_it_was(backend: str, device) -> None:
    x = far_from_zero((512, 2), "contiguous", device)
    mean, var = torch.full((2,), 1e4, device=device), torch.full((2,), 2e-4, device=device)
    clean = batch_renorm(x, mean.clone(), var.clone(), training=True)
    x[0, 0] = float("nan")
    y = batch_renorm(x, mean, var, training=True)
    assert torch.equal(y[:, 1], clean[:, 1])
    assert y[:, 0].isnan().all()


def test_a_tensor_that_is_a_view_of_its_negative(backend: str, device) -> None:
    x = torch.randn(6, 5, device=device)
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    results = []
    for given in (-x, torch._neg_view(x)):
        given = given.requires_grad_()
        y = batch_renorm(given, mean.clone(), var.clone(), training=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
