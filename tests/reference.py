"""Algorithm 1 of Ioffe (2017) in float64, written from the paper, and inputs to test it with.

Plain torch operations on purpose: gradients come from torch.autograd. Nothing of triton_brn is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LAYOUTS = ("contiguous", "channels_last")  # what the kernels read directly
ODD_LAYOUTS = ("gaps", "offset", "permuted")  # every second element; misaligned; the axes stored in reverse


class Result(NamedTuple):
    """What one training batch gives: everything in float64, (C,) but for y."""

    y: Tensor
    running_mean: Tensor
    running_var: Tensor
    r: Tensor
    d: Tensor


def batch_renorm_reference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    r_max: Any = 3.0,
    d_max: Any = 5.0,
    step: int = 0,
    average: str = "std",
) -> Result:
    """One training batch; the arguments are left as they are. Limits: a number, None or a Ramp."""
    x, mu, var = x.double(), running_mean.detach().double(), running_var.detach().double()
    r_max, d_max = _limit(r_max, step), _limit(d_max, step)
    axes, shape = _axes(x)

    mu_b = x.mean(axes)
    var_b = (x - mu_b.view(shape)).square().mean(axes)
    sigma_b = (eps + var_b).sqrt()
    sigma = (eps + var).sqrt()
    r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mu_b - mu) / sigma).clamp(-d_max, d_max).detach()
    x_hat = (x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
    y = _affine(x_hat, weight, bias)

    alpha = 1 / (step + 1) if momentum is None else momentum
    new_mu = mu + alpha * (mu_b - mu)
    if average == "std":
        new_var = ((sigma + alpha * (sigma_b - sigma)).square() - eps).clamp(min=0)
    else:
        m = x.numel() // x.shape[1]
        new_var = var + alpha * (var_b * (m / (m - 1)) - var)
    finite = (mu_b + var_b).isfinite()  # a channel with a NaN or inf keeps its statistics
    new_mu, new_var = torch.where(finite, new_mu, mu), torch.where(finite, new_var, var)
    return Result(y, new_mu.detach(), new_var.detach(), r, d)


def inference_reference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Normalisation with the running statistics."""
    shape = _axes(x)[1]
    sigma = (eps + running_var.double()).sqrt()
    return _affine((x.double() - running_mean.double().view(shape)) / sigma.view(shape), weight, bias)


def reference_gradients(
    dy: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight and dbias in float64, by torch.autograd; None for an absent weight or bias."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    x, weight, bias = leaves
    if training:
        y = batch_renorm_reference(x, running_mean, running_var, weight, bias, **options).y
    else:
        y = inference_reference(x, running_mean, running_var, weight, bias, **options)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.double()))
    dx, dweight, dbias = (None if t is None else next(grads) for t in leaves)
    return dx, dweight, dbias


def sum_scales(
    dy: Tensor, x: Tensor, *statistics: Tensor, training: bool = True, **options: Any
) -> list[Tensor]:
    """Per channel, sum |dy x_hat| and sum |dy|: what rounding errors of dweight and dbias scale with."""
    if training:
        x_hat = batch_renorm_reference(x, *statistics, **options).y
    else:
        x_hat = inference_reference(x, *statistics, **options)
    return [(dy.double() * x_hat).abs().sum(_axes(x)[0]), dy.double().abs().sum(_axes(x)[0])]


@dataclass
class Inputs:
    """Tensors of one case; ``args`` are the first five arguments of batch_renorm."""

    x: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order of batch_renorm."""
        return self.x, self.running_mean, self.running_var, self.weight, self.bias


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    device: torch.device | str = "cpu",
    affine: bool = True,
    weight_dtype: torch.dtype | None = None,
    r_max: float = 3.0,
    d_max: float = 5.0,
    eps: float = 1e-5,
    first: int = 0,
    seed: int = 0,
) -> Inputs:
    """Random tensors whose channels go through: r and d free, clipped above, clipped below.

    Three channels hold all six; nine hold every pair. With fewer, ``first`` chooses what the
    first channel is: r by ``first % 3`` (free, above, below) and d likewise.
    """
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    axes, view = _axes(torch.empty(shape, device="meta"))
    means = torch.randn(channels, generator=g, dtype=torch.float64)
    stds = torch.rand(channels, generator=g, dtype=torch.float64) + 0.5
    x = torch.randn(shape, generator=g, dtype=torch.float64) * stds.view(view) + means.view(view)
    x = x.to(dtype)

    # The running statistics are placed so that r and d fall where the channel's turn wants them.
    kind = torch.arange(channels) + first
    r_kind, d_kind = kind % 3, (2 * kind + kind // 3) % 3
    sigma_b = (eps + x.double().var(axes, correction=0)).sqrt()
    free_r = r_max ** (torch.rand(channels, generator=g, dtype=torch.float64) - 0.5)
    free_d = d_max * (torch.rand(channels, generator=g, dtype=torch.float64) - 0.5)
    r_aim = torch.where(r_kind == 0, free_r, torch.where(r_kind == 1, 2 * r_max, 0.5 / r_max))
    d_aim = torch.where(d_kind == 0, free_d, torch.where(d_kind == 1, 2.0 * d_max, -2.0 * d_max))
    sigma = sigma_b / r_aim
    running_mean = (x.double().mean(axes) - d_aim * sigma).to(stats)
    running_var = (sigma**2 - eps).clamp(min=0).to(stats)

    weight = bias = None
    if affine:
        weight = (torch.rand(channels, generator=g, dtype=torch.float64) + 0.5).to(weight_dtype or stats)
        weight[1::2] *= -1
        bias = torch.randn(channels, generator=g, dtype=torch.float64).to(weight_dtype or stats)
    dy = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    if x.numel() > channels and r_max > 1 and d_max > 0:
        found = batch_renorm_reference(x, running_mean, running_var, eps=eps, r_max=r_max, d_max=d_max)
        assert torch.equal(_side(found.r, 1 / r_max, r_max), r_kind), "r: not clipped as intended"
        assert torch.equal(_side(found.d, -d_max, d_max), d_kind), "d: not clipped as intended"

    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    return Inputs(
        lay_out(x.to(device), layout),
        move(running_mean),
        move(running_var),
        move(weight),
        move(bias),
        lay_out(dy.to(device), layout),
    )


def from_case(layer: nn.Module, case: Inputs) -> nn.Module:
    """``layer`` with the statistics and parameters of the case."""
    layer = layer.to(case.x.device)
    with torch.no_grad():
        layer.running_mean.copy_(case.running_mean)
        layer.running_var.copy_(case.running_var)
        layer.weight.copy_(case.weight)
        layer.bias.copy_(case.bias)
    return layer


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory layout."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]
    if layout == "offset":
        return torch.cat((t.new_full((1,), float("nan")), t.flatten()))[1:].view(t.shape)
    if layout == "permuted":
        axes = tuple(reversed(range(t.ndim)))
        return t.permute(axes).contiguous().permute(axes)
    raise ValueError(f"layout: {layout!r}")


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over a channel's largest expected magnitude; axis 1 (or the only one) is C."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    scale = _scale(expected)
    return float(((actual - expected).abs() / scale).max()) if actual.numel() else 0.0


def assert_accurate(
    actual: Tensor, expected: Tensor, tolerance: float | None = None, scale: Tensor | float | None = None
) -> None:
    """``actual`` is ``expected`` (float64) within ``tolerance`` of the channel's largest magnitude.

    Default: 2e-6, or 1e-13 for float64. A half-precision value is what a computation within
    ``tolerance`` gives once rounded: |actual - e| <= |rounded(e) - e| + 2 tolerance * scale.
    ``scale`` replaces that magnitude: ``scale=e.abs().max()`` for (C,) sums that may cancel.
    """
    if tolerance is None:
        tolerance = 1e-13 if actual.dtype == torch.float64 else 2e-6
    dtype = actual.dtype
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert a.shape == e.shape, f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    rounded = e.to(dtype).double() if dtype in (torch.float16, torch.bfloat16) else e
    scale = _scale(e) if scale is None else torch.as_tensor(scale).detach().cpu().double()
    allowed = 2 * tolerance * scale + (rounded - e).abs() if rounded is not e else tolerance * scale
    wrong = ~(((a - e).abs() <= allowed) | (a == rounded) | (a.isnan() & e.isnan()))
    if wrong.any():
        excess = torch.where(wrong, (a - e).abs() / scale, 0.0)
        at = tuple(int(i) for i in torch.unravel_index(excess.nan_to_num(torch.inf).argmax(), a.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {a.numel()} values are wrong; at {at}: {a[at]}, expected {e[at]}, "
            f"relative error {excess[at]:.2e}, tolerance {tolerance:.0e}"
        )


def _scale(expected: Tensor) -> Tensor:
    """Largest finite magnitude of each channel, shaped to divide ``expected``."""
    size = expected.abs().nan_to_num(0.0, posinf=0.0)
    if expected.ndim > 1 and expected.numel():
        size = size.amax(_axes(expected)[0], keepdim=True)
    return size.clamp(min=torch.finfo(torch.float32).tiny)


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes to reduce, and the shape of a (C,) vector that broadcasts over x."""
    return [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = _axes(x_hat)[1]
    y = x_hat if weight is None else weight.double().view(shape) * x_hat
    return y if bias is None else y + bias.double().view(shape)


def _limit(limit: Any, step: int) -> float:
    if limit is None:
        return float("inf")
    if isinstance(limit, (int, float)):
        return float(limit)
    if step <= limit.begin:
        return float(limit.start if limit.end > limit.begin or step < limit.begin else limit.stop)
    share = min((step - limit.begin) / max(limit.end - limit.begin, 1), 1.0)
    return float(limit.start + (limit.stop - limit.start) * share)


def _side(value: Tensor, low: float, high: float) -> Tensor:
    """0 where free, 1 where at the upper limit, 2 where at the lower."""
    return torch.where(value >= high, 1, torch.where(value <= low, 2, 0))
