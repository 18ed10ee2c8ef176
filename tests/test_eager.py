"""Plain PyTorch alone: the ways that it has for large inputs, and where each must not be taken."""

from __future__ import annotations

import pytest
import torch
from reference import assert_accurate, batch_renorm_reference, inputs, reference_gradients, sum_scales

from triton_brn import BatchRenorm1d, batch_renorm, eager

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
    assert eager.has_planes(case.x, case.running_mean)
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


@pytest.mark.parametrize("ratio", [0.0, 25.0, 40.0])
def test_many_rows(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch has a backward of its own for them, of the form x * a + b, where that is exact enough."""
    case = inputs((2048, 128))
    mean, std = case.x.mean(0), case.x.std(0)
    case.x += (torch.arange(128) == 5) * (ratio * std - mean)  # one channel lies far from zero
    before = case.running_mean.clone(), case.running_var.clone()
    truth = batch_renorm_reference(*case.args)
    taken, wide_backward = [], eager.wide_backward
    monkeypatch.setattr(eager, "wide_backward", lambda *args: taken.append(1) or wide_backward(*args))

    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=True)
    grads = torch.autograd.grad(y, leaves, case.dy)
    assert bool(taken) == (ratio < eager.NEAR)
    if ratio < eager.NEAR:
        assert_accurate(y, truth.y)
    expected = reference_gradients(case.dy, case.x, *before, case.weight, case.bias)
    assert_accurate(grads[0], expected[0])
    for grad, value, scale in zip(grads[1:], expected[1:], sum_scales(case.dy, case.x, *before), strict=True):
        assert_accurate(grad, value, scale=scale)


@pytest.mark.parametrize("affine", [True, False])
def test_no_eps(affine: bool) -> None:
    """A constant channel then has no y; its running variance falls, with a gradient or without."""
    for requires_grad in (True, False):
        layer = BatchRenorm1d(2, eps=0.0, affine=affine).requires_grad_(requires_grad)
        x = torch.stack((torch.full((8,), 2.0), torch.randn(8)), 1)
        assert layer(x)[:, 0].isnan().all()
        assert layer.running_var[0] == pytest.approx(0.99**2)
