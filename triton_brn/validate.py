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
_STRIDED = torch.strided
_VECTOR = (1,)  # the strides of a dense vector
HALVES = (torch.float16, torch.bfloat16)
Average: TypeAlias = Literal["std", "var"]
AVERAGES = get_args(Average)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is summed, and its statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_STATISTICS = {dtype: statistics_dtype(dtype) for dtype in DTYPES}


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
    try:  # what nearly all calls bring
        dtype, stats, channels, device = x.dtype, running_mean.dtype, x.shape[1], x.device
        fine = (
            stats is _STATISTICS.get(dtype) is running_var.dtype
            and x.layout is _STRIDED
            and running_mean.stride() == running_var.stride() == _VECTOR
            and running_mean.numel() == running_var.numel() == channels
            and running_mean.device == running_var.device == device
            and not (running_mean.requires_grad or running_var.requires_grad)
        )
        affine = stats
        if fine and weight is not None:
            affine = weight.dtype
            fine = affine is stats or affine is dtype
            fine = (
                fine and weight.stride() == _VECTOR and weight.numel() == channels and weight.device == device
            )
        if fine and bias is not None:
            fine = bias.dtype is affine
            fine = fine and bias.stride() == _VECTOR and bias.numel() == channels and bias.device == device
        if fine and step is not None:
            fine = step.dtype is torch.int64 and step.stride() == () and step.device == device
    except (AttributeError, IndexError, RuntimeError):
        fine = False
    if not fine:
        _find_fault(x, running_mean, running_var, weight, bias, step)


def _find_fault(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    step: Tensor | None,
) -> None:
    _check_type("input", x)
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
        _check_type(name, v)
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
        _check_type("num_batches_tracked", step)
        if step.numel() != 1 or step.dtype != torch.int64:
            raise TypeError(
                "num_batches_tracked: expected a scalar int64 tensor, "
                f"got {_name(step.dtype)} of shape {tuple(step.shape)}"
            )
        if step.device != device:
            raise ValueError(_elsewhere("num_batches_tracked", step, x))


def check_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
    settings: tuple[Any, ...],
    traced: bool,
) -> None:
    """What training needs beyond inference. settings: as the ops take them. traced: no tensor has memory."""
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
    if traced:
        return
    try:  # a look at versions is quicker than is_inference, and fails for such tensors
        _ = x._version, running_mean._version, running_var._version
        _ = weight is None or weight._version, step is None or step._version
        versions = True
    except RuntimeError:
        versions = False
    if not versions:
        _check_inference_tensors(x, weight, bias, running_mean, running_var, step)
    mean_at, var_at = running_mean.data_ptr(), running_var.data_ptr()
    apart = abs(mean_at - var_at) >= running_mean.nbytes
    if apart and weight is not None:
        apart = weight.data_ptr() not in (mean_at, var_at)
    if apart and bias is not None:
        apart = bias.data_ptr() not in (mean_at, var_at)
    if not apart:
        _check_memory(weight, bias, running_mean, running_var)


def _check_inference_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor | None,
) -> None:
    """torch itself refuses them when statistics have been updated, or never."""
    updated = (("running_mean", running_mean), ("running_var", running_var), ("num_batches_tracked", step))
    if not torch.is_inference_mode_enabled():
        for name, t in updated:
            if t is not None and t.is_inference():
                raise RuntimeError(
                    f"{name}: Inplace update to inference tensor outside InferenceMode is not allowed: make "
                    "the layer outside torch.inference_mode, or clone the tensor"
                )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        for name, t in (("input", x), ("weight", weight)):
            if t is not None and t.is_inference():
                raise RuntimeError(
                    f"{name}: Inference tensors cannot be saved for backward: clone it outside "
                    "torch.inference_mode, or train under torch.no_grad"
                )


def _check_memory(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor
) -> None:
    named = (("running_var", running_var), ("weight", weight), ("bias", bias))
    for updated, t in (("running_mean", running_mean), ("running_var", running_var)):
        for name, v in named[updated == "running_var" :]:
            if v is None or not (t.data_ptr() and v.data_ptr()):
                continue
            if t.data_ptr() < v.data_ptr() + v.nbytes and v.data_ptr() < t.data_ptr() + t.nbytes:
                raise ValueError(
                    f"{name}: expected memory of its own, as {updated} is updated in place, got "
                    f"{updated}'s: clone one of them"
                )


def _check_type(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.is_nested or t.layout is not _STRIDED:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def _refuse(name: str, v: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    channels = x.shape[1]
    if v.shape != x.shape[1:2]:
        raise ValueError(
            f"{name}: expected shape ({channels},) for an input of {channels} channels, got {tuple(v.shape)}"
        )
    if v.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(_name, dtypes)))
        message = f"{name}: expected {allowed} for a {_name(x.dtype)} input, got {_name(v.dtype)}"
        if v.is_floating_point():
            layer, tensor = (
                (".double()", ".float()") if x.dtype == torch.float64 else (".float()", ".double()")
            )
            message += f": call layer{layer}"
            if torch.float64 in (x.dtype, v.dtype):
                message += f", or input{tensor}"
        raise TypeError(message)
    raise ValueError(_elsewhere(name, v, x))


def _elsewhere(name: str, t: Tensor, x: Tensor) -> str:
    return f"{name}: expected the input's device {x.device}, got {t.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
