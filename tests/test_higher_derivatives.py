"""Gradients of gradients of gradients, by create_graph, against those of Algorithm 1 in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Inputs, assert_accurate, batch_renorm_reference, inference_reference, inputs
from torch import Tensor

from triton_brn import batch_renorm


def derivatives(
    function: Callable[..., Tensor], values: list[Tensor], order: int, share: float = 0.05
) -> list[Tensor]:
    """With respect to all values: of a loss, then of a share of the squares of those, and so on."""
    leaves = [v.detach().requires_grad_() for v in values]
    y = function(*leaves)
    slope = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    loss = ((y.double() + slope) ** 3).mean() / 2
    found: list[Tensor] = []
    for _ in range(order):
        found = list(torch.autograd.grad(loss, leaves, create_graph=True))
        loss = share * sum((g.double() ** 2).sum() for g in found)
    return found


def functions(
    case: Inputs, training: bool, **limits: Any
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    statistics = case.running_mean, case.running_var

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_renorm(x, *(s.clone() for s in statistics), weight, bias, training=training, **limits)

    def truth(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if training:
            return batch_renorm_reference(x, *statistics, weight, bias, **limits).y
        return inference_reference(x, *statistics, weight, bias)

    return ours, truth


LIMITS = {"none": {"r_max": 1.0, "d_max": 0.0}, "some": {"r_max": 3.0, "d_max": 5.0}}


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("training", [True, False])
def test_of_any_order(training: bool, limits: str, order: int, backend: str, device) -> None:
    case = inputs((5, 3), torch.float64, device=device)
    values = [case.x, case.weight, case.bias]
    ours, truth = functions(case, training, **LIMITS[limits])
    for actual, expected in zip(
        derivatives(ours, values, order), derivatives(truth, values, order), strict=True
    ):
        assert_accurate(actual, expected, 1e-11, scale=expected.abs().max())


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((4, 3, 2, 3), "contiguous", torch.float32),
        ((4, 3, 2, 3), "channels_last", torch.float32),
        ((4, 3, 2, 2, 2), "channels_last", torch.float64),
        ((4, 3, 5), "gaps", torch.float32),
        ((4, 3, 1, 5), "contiguous", torch.float32),
        ((8, 3), "permuted", torch.float32),
        ((8, 3), "contiguous", torch.float16),
        ((4, 3, 2, 3), "channels_last", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("limits", LIMITS)
def test_of_every_layout(
    limits: str, affine: bool, shape: tuple[int, ...], layout: str, dtype: torch.dtype, backend: str, device
) -> None:
    """Third derivatives. Half precision rounds y, and each gradient that it hands on."""
    case = inputs(shape, dtype, layout, device=device, affine=affine)
    values = [t for t in (case.x, case.weight, case.bias) if t is not None]
    ours, truth = functions(case, True, **LIMITS[limits])
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    share = 5e-3 if dtype == torch.float16 and affine and limits == "some" else 0.05  # it ends at 65,504
    third = [derivatives(function, values, 3, share) for function in (ours, truth)]
    for actual, expected in zip(*third, strict=True):
        assert actual.dtype in (dtype, case.running_mean.dtype)
        assert_accurate(actual.double(), expected.double(), tolerance, scale=expected.abs().max())
