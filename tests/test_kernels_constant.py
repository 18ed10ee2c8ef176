"""Channels that never vary, on the kernels: no rounding may turn them into ones that do."""

from __future__ import annotations

import pytest
import torch
from reference import LAYOUTS, lay_out
from test_kernels import DTYPES, EVERYWHERE, GPU, STRATEGIES

from triton_brn import forced_strategy, planner, views

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

VALUES = (0.1, 1e10, 1e-30, -3.3e4)  # of the channels
SHAPES = ((7, 4), (700, 4), (13, 4, 5, 7), (3, 4, 9, 7), (5, 4, 36, 35))
SETTINGS = (0.25, 1e-5, [3.0, 3.0, 0.0, 1.0], [5.0, 5.0, 0.0, 1.0], True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_constant_channels(strategy: str, layout: str, dtype: torch.dtype, device) -> None:
    """mean is the value itself, M2 is 0, and y is beta + gamma * d, everywhere the same."""
    served = 0
    values = torch.tensor(VALUES, device=device).clamp(max=min(1e10, torch.finfo(dtype).max)).to(dtype)
    for shape in SHAPES[0 if layout == "contiguous" else 2 :]:
        x = lay_out(values.view(1, 4, *[1] * (len(shape) - 2)).expand(shape), layout)
        if serves(strategy, x):
            assert_constant(x, values, strategy)
            served += 1
    assert served or strategy not in EVERYWHERE


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_a_value_whose_square_overflows(strategy: str, device) -> None:
    """Some splits of such maps have no edges: an empty set that is merged adds nothing, nor NaN."""
    values = torch.full((3,), 1e20, device=device)
    x = values.view(1, 3, 1, 1).expand(2, 3, 37, 37).contiguous()
    assert_constant(x, values, strategy)


def serves(strategy: str, x: torch.Tensor) -> bool:
    view = views.view_of(x.shape, x.stride())
    try:
        planner.plan("forward", view, x.element_size(), GPU, strategy)
    except ValueError:
        return False
    return True


def assert_constant(x: torch.Tensor, values: torch.Tensor, strategy: str) -> None:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var, beta = torch.randn(3, len(values), dtype=statistics, device=x.device)
    var, gamma = var.exp(), beta.exp()
    with forced_strategy(strategy):
        y, saved = launch.forward(x, gamma, beta, mean, var, None, *SETTINGS)
    assert torch.equal(saved[0], values.to(statistics))
    assert not saved[1].any()
    rstd = torch.full_like(beta, 1e-5).rsqrt()
    torch.testing.assert_close(saved[2], rstd, rtol=1e-6, atol=0)
    expected = torch.addcmul(beta.double(), gamma.double(), saved[4].double()).to(y.dtype)
    line = y.transpose(1, -1).reshape(-1, len(values))
    assert torch.equal(line, line[:1].expand_as(line))
    torch.testing.assert_close(line[0], expected, rtol=torch.finfo(y.dtype).eps, atol=3e-7)


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_where_a_channel_begins(strategy: str, layout: str, device) -> None:
    """The distances that are summed are those from it: the sums lose nothing."""
    x = torch.randn(32, 3, 9, 7, device=device)
    x[0, :, 0, 0] = 1e6
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with forced_strategy(strategy):
        saved = launch.forward(lay_out(x, layout), None, None, mean, var, None, *SETTINGS)[1]
    rows = x.double().transpose(0, 1).reshape(3, -1)
    std = (rows.var(1, correction=0) + 1e-5).sqrt()
    assert ((saved[0].double() + saved[1] - rows.mean(1)).abs() / std).max() < 1e-6
    assert ((1 / saved[2].double() - std).abs() / std).max() < 5e-5  # the interpreter sums squares one by one


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_no_momentum_leaves_the_statistics_bitwise(strategy: str, average: str, device) -> None:
    shift = torch.tensor([0.0, 1e4, -1e30, float("nan"), 3.0], device=device)
    for dtype in (torch.float32, torch.float64):
        x = (torch.randn(40, 5, device=device) + shift).to(dtype)
        mean = torch.tensor([-0.0, 0.1, 0.0, 1e30, 3.0], dtype=dtype, device=device)
        var = torch.tensor([0.1, 0.7, 0.0, 1.3, float("inf")], dtype=dtype, device=device)
        before, step = torch.stack((mean, var)), torch.tensor(7, device=device)
        with forced_strategy(strategy):
            launch.forward(x, None, None, mean, var, step, 0.0, *SETTINGS[1:4], average == "std")
        bits = [t.view(torch.int32 if dtype == torch.float32 else torch.int64) for t in (mean, var, before)]
        assert torch.equal(torch.stack(bits[:2]), bits[2])
        assert step == 8
