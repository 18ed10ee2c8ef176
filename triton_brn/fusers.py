"""torch.ao.quantization's fuse_modules looks types up in a table: ours are entered beside BatchNorm's."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

_log = logging.getLogger(__name__)

_RENORMS = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
}


def register() -> None:
    """Enter the layers, unless nobody has imported the table: torch does, up to 2.13 at least."""
    mappings = sys.modules.get("torch.ao.quantization.fuser_method_mappings")
    table = getattr(mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    for types, fuse in list(table.items()):
        ours = tuple(_RENORMS.get(t, t) for t in types)
        if ours != types:
            table.setdefault(ours, functools.partial(_fused, fuse))


def _fused(fuse: Callable[..., nn.Module], is_qat: bool, *modules: nn.Module) -> nn.Module:
    if is_qat:
        _log.warning(
            "fuse_modules_qat: a BatchRenorm layer becomes a BatchNorm, which torch's fused modules train"
        )
    return fuse(is_qat, *(_batchnorm_of(m) if type(m) in _RENORMS.values() else m for m in modules))


def _batchnorm_of(layer: Any) -> nn.Module:
    """The BatchNorm of the same tensors."""
    norm = next(norm for norm, renorm in _RENORMS.items() if type(layer) is renorm)
    with torch.device("meta"):
        new = norm(layer.num_features, layer.eps, layer.momentum, layer.affine)
    new._parameters.update(layer._parameters)
    new._buffers.update(layer._buffers)
    return new.train(layer.training)
