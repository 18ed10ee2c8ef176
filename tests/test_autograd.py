"""Gradients, and gradients of gradients, by finite differences; what autograd saves, and computes anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import Inputs, batch_renorm_reference, inputs
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, batch_renorm


def small(layout: str, affine: bool, device: torch.device) -> tuple[Inputs, list[Tensor]]:
    """A case for finite differences, and those of x, weight and bias that there are, as leaves."""
    case = inputs((3, 3, 2, 3), torch.float64, layout, device=device, affine=affine)
    return case, [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]


def with_running_statistics(case: Inputs) -> Callable[..., Tensor]:
    """Inference."""

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_renorm(x, case.running_mean, case.running_var, weight, bias)

    return function


def with_fixed_correction(r: Tensor, d: Tensor, eps: float) -> Callable[..., Tensor]:
    """batch_renorm whose running statistics follow x, so that r and d are constant indeed."""

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        with torch.no_grad():
            sigma = (x.var(axes, correction=0) + eps).sqrt() / r
            mean = x.mean(axes) - d * sigma
        return batch_renorm(x, mean, sigma**2 - eps, weight, bias, training=True, eps=eps)

    return function


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_training(layout: str, affine: bool, backend: str, device) -> None:
    case, leaves = small(layout, affine, device)
    free = batch_renorm_reference(*case.args)
    for r, d in ((free.r, free.d), (free.r / 3, free.d / 5), (torch.ones(3), torch.zeros(3))):
        function = with_fixed_correction(r.to(device) * (1 - 1e-9), d.to(device) * (1 - 1e-9), 1e-3)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton", nondet_tol=0.0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_inference(layout: str, affine: bool, backend: str, device) -> None:
    case, leaves = small(layout, affine, device)
    function = with_running_statistics(case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton", nondet_tol=0.0)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_asked_for(training: bool, needs: tuple[int, ...], backend: str, device) -> None:
    case = inputs((4, 3, 5), device=device)

    def gradients(wanted: tuple[int, ...]) -> list[Tensor | None]:
        leaves = [
            t.detach().clone().requires_grad_(bool(n))
            for t, n in zip((case.x, case.weight, case.bias), wanted, strict=True)
        ]
        x, weight, bias = leaves
        statistics = (case.running_mean.clone(), case.running_var.clone())
        batch_renorm(x, *statistics, weight, bias, training=training).backward(case.dy)
        return [t.grad for t in leaves]

    for got, full, need in zip(gradients(needs), gradients((1, 1, 1)), needs, strict=True):
        if need:
            torch.testing.assert_close(got, full, rtol=0, atol=1e-6)
        else:
            assert got is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradgradcheck(layout: str, affine: bool, backend: str, device) -> None:
    """As for a gradient penalty."""
    case, leaves = small(layout, affine, device)
    free = batch_renorm_reference(*case.args)
    fixed = with_fixed_correction(free.r.to(device) * (1 - 1e-9), free.d.to(device) * (1 - 1e-9), 1e-3)

    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        statistics = (case.running_mean.clone(), case.running_var.clone())
        return batch_renorm(x, *statistics, weight, bias, training=True, r_max=1.0, d_max=0.0)

    for function in (fixed, plain, with_running_statistics(case)):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_can_be_differentiated_are_the_same(
    dtype: torch.dtype, training: bool, backend: str, device
) -> None:
    case = inputs((4, 3, 5), dtype, device=device)
    if dtype == torch.float32 and training:
        case.x[:, 1] = case.x[:, 1] * 1e-2 + 1e4
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=training)
    expected = torch.autograd.grad(y, leaves, case.dy, retain_graph=True)
    actual = torch.autograd.grad(y, leaves, case.dy, create_graph=True)
    assert actual[0].requires_grad
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


@pytest.mark.parametrize("with_grad", [True, False])
def test_autograd_knows_that_the_buffers_change(with_grad: bool, backend: str, device) -> None:
    layer = BatchRenorm1d(3).to(device).requires_grad_(with_grad)
    versions = [b._version for b in layer.buffers()]
    layer(torch.randn(8, 3, device=device))
    assert all(b._version > v for b, v in zip(layer.buffers(), versions, strict=True))


def test_two_forwards_then_backward(backend: str, device) -> None:
    """What is saved for the backward is not the running statistics: they may change in between."""
    layer = BatchRenorm1d(3, r_max=3.0, d_max=5.0).to(device)
    x = torch.randn(8, 3, device=device, requires_grad=True)
    first = layer(x)
    (expected,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    layer(x * 2)
    layer.eval()(x)
    assert torch.equal(torch.autograd.grad(first.square().sum(), x)[0], expected)


def test_what_the_backward_reads_may_not_change_before_it(backend: str, device) -> None:
    """As in torch: after an optimiser's step the gradient would be wrong."""
    layer = BatchRenorm1d(3).to(device)
    y = layer(torch.randn(8, 3, device=device, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_normalises_what_it_computes_anew(backend: str, device) -> None:
    """The second forward has statistics of its own: there, too, a bias before a layer has no gradient."""
    model = nn.Sequential(
        *(
            m
            for _ in range(2)
            for m in (nn.Linear(4, 4), BatchRenorm1d(4, r_max=3.0, d_max=5.0, momentum=None))
        )
    ).to(device)
    x, dy = torch.randn(16, 4, device=device) * 3 + 2, torch.randn(16, 4, device=device)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).backward(dy)
    for linear in model[::2]:
        assert linear.bias.grad.norm() < 1e-5 * linear.weight.grad.norm()


def test_checkpointing_where_the_correction_begins(backend: str, device) -> None:
    """The second forward of batch 5,000 counts 5,001: it corrects, the first did not."""
    model = nn.Sequential(nn.Linear(8, 8), BatchRenorm1d(8), nn.ReLU()).to(device)
    model[1].num_batches_tracked.fill_(5_000)
    x = torch.randn(16, 8, device=device, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()
