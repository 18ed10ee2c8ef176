"""What those who trace a call are given: a node of torch.fx's, or torch's own batch norm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_tracing
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from .eager import in_dtype


def of_stand_in(function: Callable[..., Any], tensors: tuple[Any, ...], **options: Any) -> Any:
    """The call of ``function`` with what torch.fx passes for a tensor: a node of its graph."""
    if not has_torch_function_unary(tensors[0]):
        raise TypeError(f"input: expected a tensor, got {type(tensors[0]).__name__}")
    return handle_torch_function(function, tensors[:1], *tensors, **options)


def before_dispatch() -> bool:
    """Whether make_fx looks on before torch's dispatcher, with a mode of torch functions. Others have such
    modes too: torch.set_default_device."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def refuse_script() -> NoReturn:
    """In the place of ``batch_renorm``, where torch.jit.script asks for what it is to compile."""
    raise RuntimeError(
        "torch.jit.script: batch_renorm cannot be scripted: use a BatchRenorm layer, which can in eval, "
        "or torch.jit.trace, torch.export or torch.compile"
    )


def train() -> bool:
    """Whether a training call that is traced trains.

    torch.onnx.export warns of a model in training mode, and exports BatchNorm as in eval all the same;
    where it goes by jit.trace, it has put the model in eval mode itself, unless it was told not to.
    """
    if is_dynamo_compiling() or _is_tracing():
        return True
    onnx = sys.modules.get("torch.onnx")
    return onnx is None or not onnx.is_in_onnx_export()


def inference(x, running_mean, running_var, weight, bias, eps) -> Tensor:  # type: ignore[no-untyped-def]
    """By torch's own operator, which whoever traces knows: exported, folded into a convolution, fused."""
    weight, bias = _vector(weight, running_mean), _vector(bias, running_mean)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def _vector(v: Tensor | None, running_mean: Tensor) -> Tensor | None:
    """As torch takes it beside running statistics: of their dtype, and contiguous for cuDNN."""
    v = in_dtype(v, running_mean.dtype)
    return v if v is None or v.is_contiguous() else v.contiguous()
