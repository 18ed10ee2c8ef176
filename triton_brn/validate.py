"""Checks of what users pass: every error names its argument and comes before any change."""

from __future__ import annotations

import operator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from .ramp import is_number

#: The dtypes of inputs, by their names on the command line.
NAMED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPES = tuple(NAMED_DTYPES.values())
HALVES = (torch.float16, torch.bfloat16)
Average: TypeAlias = Literal["std", "var"]
AVERAGES = get_args(Average)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is summed, and its statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_numbers(momentum: float | None, eps: float, running_average: str) -> None:
    if momentum is not None and not (is_number(momentum) and 0.0 <= momentum <= 1.0):
        raise ValueError(f"momentum: expected None or a number in [0, 1], got {momentum!r}")
    if not (is_number(eps) and 0.0 <= eps < float("inf")):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    if running_average not in AVERAGES:
        raise ValueError(f"running_average: expected 'std' or 'var', got {running_average!r}")


def check_layer(num_features: int, track_running_stats: bool) -> None:
    try:
        channels = operator.index(num_features)
    except TypeError:
        raise TypeError(f"num_features: expected an integer >= 0, got {num_features!r}") from None
    if channels < 0:
        raise ValueError(f"num_features: expected an integer >= 0, got {channels}")
    if not track_running_stats:
        raise ValueError(
            "track_running_stats: expected True, got False: batch renorm without running statistics is batch "
            "norm, for which there is torch.nn.BatchNorm"
        )


def check_tensors(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    step: Tensor | None,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"input: expected float32, float16, bfloat16 or float64, got {_name(x.dtype)}")
    if x.ndim < 2:
        raise ValueError(f"input: expected (N, C) or (N, C, ...), got {x.ndim} dimension(s)")
    stats = (statistics_dtype(x.dtype),)
    affine = (x.dtype, *stats)
    vectors = (
        ("running_mean", running_mean, stats),
        ("running_var", running_var, stats),
        ("weight", weight, affine),
        ("bias", bias, affine),
    )
    device, shape = x.device, x.shape[1:2]
    for name, v, dtypes in vectors:
        if v is None:
            if dtypes is affine:
                continue
            raise TypeError(f"{name}: expected a tensor, got None")
        if v.shape != shape or v.dtype not in dtypes or v.device != device:
            if running_mean.shape == running_var.shape != shape and v.ndim == 1:  # as those of a layer
                raise ValueError(f"input: expected {len(running_mean)} channels, got {x.shape[1]}")
            _refuse(name, v, x, dtypes)
        if dtypes is stats and (v.requires_grad or not v.is_contiguous()):
            if (
                not v.requires_grad and _are_functorch_transforms_active()
            ):  # vmap's are what in_dims makes them
                continue
            raise ValueError(f"{name}: expected a contiguous tensor that does not require grad")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: expected weight's dtype {_name(weight.dtype)}, got {_name(bias.dtype)}")
    if step is not None:
        if step.numel() != 1 or step.dtype != torch.int64:
            raise TypeError(
                "num_batches_tracked: expected a scalar int64 tensor, "
                f"got {_name(step.dtype)} of shape {tuple(step.shape)}"
            )
        if step.device != device:
            raise ValueError(_elsewhere("num_batches_tracked", step, x))


def check_batch(x: Tensor, step: Tensor | None, settings: tuple[Any, ...]) -> None:
    """What training needs beyond inference. settings: as the ops take them."""
    if x.numel() == x.shape[1] != 0:
        raise ValueError(
            f"input: expected more than 1 value per channel when training, got shape {tuple(x.shape)}"
        )
    if step is None:
        momentum, _, r_max, d_max, _ = settings
        if momentum < 0:
            raise ValueError("num_batches_tracked: momentum=None needs it")
        for name, (start, stop, _, _) in (("r_max", r_max), ("d_max", d_max)):
            if start != stop:
                raise ValueError(f"num_batches_tracked: a Ramp as {name} needs it")


def _refuse(name: str, v: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    channels = x.shape[1]
    if v.shape != x.shape[1:2]:
        raise ValueError(
            f"{name}: expected shape ({channels},) for an input of {channels} channels, got {tuple(v.shape)}"
        )
    if v.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(_name, dtypes)))
        raise TypeError(f"{name}: expected {allowed} for a {_name(x.dtype)} input, got {_name(v.dtype)}")
    raise ValueError(_elsewhere(name, v, x))


def _elsewhere(name: str, t: Tensor, x: Tensor) -> str:
    return f"{name}: expected the input's device {x.device}, got {t.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
