"""Whether a subclass of BatchNorm is a norm, then dropout, then an activation, as timm's BatchNormAct2d."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .swap import twin

_SPATIAL: dict[type[_BatchNorm], int] = {
    nn.BatchNorm1d: 0,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: 2,
}


class _Stub(nn.Module):
    """Stands for a child, and notes what it was given and what it gave."""

    given: Any = None
    gave: Any = None

    def forward(self, input: Tensor) -> Tensor:
        self.given, self.gave = input, torch.empty_like(input)
        return self.gave


def is_norm_drop_act(layer: Any, norm: type[_BatchNorm]) -> bool:
    """Whether a subclass's forward is ``act(drop(norm(x)))``: a twin is run, with stubs for its children.

    Its output must be what ``act`` gave, whose input what ``drop`` gave, whose input what torch's norm gives.
    """
    drop, act = (isinstance(getattr(layer, name, None), nn.Module) for name in ("drop", "act"))
    if not act or set(layer._modules) - {"drop", "act", "parametrizations"}:
        return False
    probe, mean, var = twin(layer), layer.running_mean, layer.running_var
    probe.__dict__["_buffers"] = {n: None if t is None else t.clone() for n, t in layer._buffers.items()}
    shape = (2, len(mean), *(2,) * _SPATIAL[norm])
    like = mean if layer.weight is None else layer.weight
    x = torch.arange(math.prod(shape), device=mean.device).sin().reshape(shape).to(like.dtype)
    modes = (False,) if norm is nn.SyncBatchNorm else (False, True)  # it would wait for other processes
    for training in modes:
        first = last = probe._modules["act"] = _Stub()
        if drop:
            first = probe._modules["drop"] = _Stub()
        probe.__dict__["training"] = training
        moments: tuple[Tensor | None, Tensor | None] = (None, None) if training else (mean, var)
        try:
            with torch.no_grad():
                out = type(layer).forward(probe, x)
                right = nn.functional.batch_norm(
                    x, moments[0], moments[1], layer.weight, layer.bias, training, 0.0, layer.eps
                )
        except Exception:
            return False
        if out is not last.gave or (drop and last.given is not first.gave):
            return False
        if not x.is_meta and not torch.allclose(first.given, right, rtol=1e-3, atol=1e-3, equal_nan=True):
            return False
    return True
