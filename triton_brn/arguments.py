"""What the kernels are given: tensors whose memory holds their values, and numbers."""

from __future__ import annotations

import functools
import logging
import struct
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def alignment(tensors: tuple[Tensor | None, ...]) -> tuple[bool | None, ...] | None:
    """Whether each tensor begins at a multiple of 16 bytes, None where there is none. Or None: the memory
    of one does not hold its values, being a view of the negatives of others, or a zero tensor without any."""
    found: list[bool | None] = []
    for t in tensors:
        if t is None:
            found.append(None)
        else:
            address = t.data_ptr()
            if t.is_neg() or not address:
                return None
            found.append(address % 16 == 0)
    return tuple(found)


def resolved(t: Tensor | None) -> Tensor | None:
    """The tensor, or a copy whose memory holds its values."""
    if t is None:
        return None
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


def dtype_of(weight: Tensor | None, bias: Tensor | None) -> torch.dtype | None:
    """The dtype of both, or of the one there is."""
    like = bias if weight is None else weight
    return None if like is None else like.dtype


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """dy, or a copy of it, with the strides of x."""
    if dy.dtype == x.dtype:
        if dy.stride() == x.stride():
            return dy
        if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), dy.stride(), strict=True)):
            return dy
    _log.debug("gradient of strides %s, %s: copied to the input's %s", dy.stride(), dy.dtype, x.stride())
    return torch.empty_like(x).copy_(dy)


@functools.lru_cache(maxsize=1024)
def numbers(values: Any) -> Any:
    """Numbers, in nested tuples, as the kernels take them: (nearest float32, remainder)."""
    if isinstance(values, tuple):
        return tuple(numbers(v) for v in values)
    if abs(values) > 3.4e38:
        return (values * float("inf"), 0.0)
    nearest = struct.unpack("f", struct.pack("f", values))[0]
    return (nearest, values - nearest)
