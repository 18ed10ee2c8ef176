"""Batch renorm, then dropout, then an activation, in one layer: what timm calls a norm_act layer."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm

_log = logging.getLogger(__name__)


class _Activated(_BatchRenorm):
    if TYPE_CHECKING:  # torch.jit.script reads annotations
        drop: nn.Module
        act: nn.Module

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: type[nn.Module] | Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = activation(act_layer if apply_act else None, act_kwargs, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():  # it knows no super()
            return self.act(self.drop(self._scripted(input)))
        return self.act(self.drop(super().forward(input)))


class BatchRenormAct1d(_Activated, BatchRenorm1d):
    """``BatchRenormAct2d`` for (N, C) or (N, C, L) inputs."""


class BatchRenormAct2d(_Activated, BatchRenorm2d):
    """``act(drop(BatchRenorm2d(x)))``, with the arguments of timm's BatchNormAct2d and in its order.

    ``timm.create_model(..., norm_layer=BatchRenormAct2d)`` takes it, whether timm is imported before or
    after. It takes BatchRenorm2d too, of which timm makes this layer where a network wants one. Networks
    that apply their activation themselves, as resnets, want BatchRenorm2d; those whose generator takes no
    norm_layer, as mobilenetv3, want ``convert_batchnorm``. Once timm is imported the layers are
    instances of its BatchNormAct2d, so that its freeze and its conversions keep the activation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``BatchRenorm2d``.
        apply_act: False: no activation.
        act_layer: what makes the activation: a class or function, the name of one ("relu", "silu": timm's
            where timm is imported, else torch.nn's), or None for no activation.
        act_kwargs: keyword arguments for it.
        inplace: passed to it where it takes ``inplace`` and ``act_kwargs`` does not say.
        drop_layer: what makes the layer between; None for nothing.
        options: ``bias``, ``r_max``, ``d_max`` and ``running_average``, as ``BatchRenorm2d``.

    Raises:
        ValueError: a name that is no activation's.
    """


class BatchRenormAct3d(_Activated, BatchRenorm3d):
    """``BatchRenormAct2d`` for (N, C, D, H, W) inputs."""


class _BatchNormAct(nn.modules.batchnorm._BatchNorm):
    """What an activated layer is reverted to: torch's BatchNorm, then ``drop``, then ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    __doc__ = _BatchNormAct.__doc__


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    __doc__ = _BatchNormAct.__doc__


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    __doc__ = _BatchNormAct.__doc__


def activation(layer: Any, arguments: dict[str, Any] | None, inplace: bool) -> nn.Module:
    """An activation as timm's layers are told of it."""
    arguments = dict(arguments or {})
    if isinstance(layer, str) and layer:
        layer = _named(layer)
    if not layer:
        return nn.Identity()
    if "inplace" in inspect.signature(layer).parameters:
        arguments.setdefault("inplace", inplace)
    else:
        arguments.pop("inplace", None)
    return layer(**arguments)


def _named(name: str) -> Any:
    timm = sys.modules.get("timm.layers")
    key = name.lower().replace("_", "")
    in_torch = {kind.lower(): getattr(nn, kind) for kind in nn.modules.activation.__all__}
    in_torch |= {"swish": nn.SiLU, "identity": nn.Identity}
    try:
        return timm.get_act_layer(name) if timm else in_torch[key]
    except KeyError:
        cure = "" if timm else " (timm's names are known once timm is imported)"
        raise ValueError(f"act_layer: expected an activation's name, got {name!r}{cure}") from None


def _join_timm(timm_layers: ModuleType) -> None:
    """timm takes norm layers by tables of classes, and knows norm_act layers by isinstance."""
    try:
        tables = sys.modules["timm.layers.create_norm_act"]
        tables._NORM_ACT_TYPES.add(BatchRenormAct2d)
        tables._NORM_ACT_REQUIRES_ARG.add(BatchRenormAct2d)
        tables._NORM_TO_NORM_ACT_MAP["batchrenorm2d"] = BatchRenormAct2d
        BatchRenormAct2d.__bases__ = (_Activated, BatchRenorm2d, timm_layers.BatchNormAct2d)
    except (AttributeError, KeyError, TypeError) as error:
        _log.warning("norm_layer= of this timm will not take ours: its tables are not as in 1.0 (%s)", error)


class _AtImport(importlib.abc.MetaPathFinder):
    """Joins timm when it is imported. It costs every other import one comparison of names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "timm.layers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                _join_timm(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm.layers" in sys.modules:
    _join_timm(sys.modules["timm.layers"])
else:
    sys.meta_path.insert(0, _AtImport())
