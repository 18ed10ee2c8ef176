"""convert_batchnorm: a trained or new model's BatchNorm layers become BatchRenorm layers."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from .validate import statistics_dtype

_log = logging.getLogger(__name__)

_LAYERS: dict[type[nn.Module], type[BatchRenorm1d | BatchRenorm2d | BatchRenorm3d]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
}


def convert_batchnorm(module: nn.Module, **options: Any) -> nn.Module:
    """Replace every BatchNorm1d, 2d and 3d in ``module`` by the BatchRenorm layer of the same rank.

    Weight and bias (the same objects, so an optimizer keeps them), running statistics, dtype,
    device, training flag and eps are kept. The momentum is not: it becomes batch renorm's 0.01,
    or what ``options`` says. A layer without running statistics starts with fresh ones. A second
    call changes nothing. Subclasses of the three are left as they are: they may do more.

    Args:
        module: a model, or one BatchNorm layer.
        options: keyword arguments of the new layers (``momentum``, ``r_max``, ``d_max``,
            ``running_average``).

    Returns:
        The model, changed in place; a new layer where ``module`` itself is a BatchNorm, as
        torch.nn.SyncBatchNorm.convert_sync_batchnorm does.
    """
    return _convert(module, options, {})


def _convert(module: nn.Module, options: dict[str, Any], done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:  # a layer used in several places stays one layer
        done[module] = new = _replacement(module, options)
        for name, child in new._modules.items():
            if child is not None:
                new._modules[name] = _convert(child, options, done)
    return done[module]


def _replacement(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, _BatchRenorm):
        return module
    layer = _LAYERS.get(type(module))
    if layer is None:
        _log.warning("convert_batchnorm: left %s as it is, a subclass of BatchNorm", type(module).__name__)
        return module
    like = module.running_mean if module.weight is None else module.weight
    where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    new = layer(
        module.num_features,
        module.eps,
        affine=module.affine,
        bias=module.bias is not None,
        **where,
        **options,
    )
    if module.affine:
        new.weight, new.bias = module.weight, module.bias
    if module.running_mean is not None and module.running_var is not None:
        stats = statistics_dtype(module.running_mean.dtype)
        new.running_mean = module.running_mean.to(stats)
        new.running_var = module.running_var.to(stats)
        if module.num_batches_tracked is not None:
            new.num_batches_tracked = module.num_batches_tracked
    new.train(module.training)
    return new
