"""convert_batchnorm and revert_to_batchnorm: a model's BatchNorm layers become batch renorm, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import activated
from .foreign import Kin, is_ours, kin
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from .norm_shape import is_norm_drop_act
from .swap import Change, Left, accumulators, change, change_all, kind_of, settings
from .validate import HALVES, check_numbers

_MOMENTUM = 0.01
_TRAINED = {"r_max": 3.0, "d_max": 5.0}
_ANY_RANK = (2, 3, 4, 5)

_PAIRS: list[tuple[type[_BatchNorm], type[_BatchRenorm], type[_BatchRenorm], type[_BatchNorm]]] = [
    (nn.BatchNorm1d, BatchRenorm1d, activated.BatchRenormAct1d, activated.BatchNormAct1d),
    (nn.BatchNorm2d, BatchRenorm2d, activated.BatchRenormAct2d, activated.BatchNormAct2d),
    (nn.BatchNorm3d, BatchRenorm3d, activated.BatchRenormAct3d, activated.BatchNormAct3d),
    (nn.SyncBatchNorm, BatchRenorm2d, activated.BatchRenormAct2d, activated.BatchNormAct2d),
]

#: What a class of the user's becomes: one of ours, or what a function of the layer returns.
Target = type[nn.Module] | Callable[[Any], nn.Module]


def convert_batchnorm(
    module: nn.Module, *, classes: Mapping[type[nn.Module], Target] | None = None, **options: Any
) -> nn.Module:
    """Every BatchNorm of a model becomes batch renorm of the same rank.

    Converted are torch.nn.BatchNorm1d, 2d and 3d, SyncBatchNorm (each process then has statistics of its
    own: the log warns), their subclasses that compute ``act(drop(norm(x)))`` with children of these names
    (timm's BatchNormAct2d: ``drop`` and ``act`` are kept), and ``classes``. Left as they are, which the log
    says: layers without running statistics, lazy layers that are not initialised, and other subclasses,
    which may do more than their norm. Layers that are batch renorm already are left too.

    A layer stays the same object and changes its class. So parameters (and optimizers), buffers (but for
    half precision: running statistics become float32), hooks, parametrizations, pruning, attributes,
    training flag, eps and compiled models are kept. Nothing is changed if anything is refused.

    - Limits: layers whose statistics are trained (a batch was counted, or they are not 0 and 1) get the
      constant limits ``r_max=3, d_max=5`` and so train from where they stand. Others get the paper's
      ramps, as new layers have (also on the meta device, where statistics cannot be read).
    - Momentum: 0.01, or the layer's own where that is less (0 stays 0). BatchNorm's 0.1 follows the last
      dozen batches, too noisy to normalise by; None, the average of all batches, stands still after many.
    - The counter of batches is kept; ramps that ``options`` give run over it.

    Args:
        module: a model, which is changed and returned. If it is itself a BatchNorm it stays what it is, and
            a new layer that shares its tensors is returned, as torch's convert_sync_batchnorm does.
        classes: further classes (not their subclasses) and what they become. ``{MyNorm: BatchRenorm2d}``: the
            same object with BatchRenorm2d's forward; MyNorm needs BatchNorm's attributes. ``{MyNorm: make}``:
            the module that ``make(layer)`` returns takes the layer's place; ``make`` must not change it.
        options: of every new layer (but for what functions of ``classes`` return), whatever is said above:
            ``momentum``, ``r_max``, ``d_max`` and ``running_average``.

    Returns:
        The model. The logger "triton_brn.convert" says in one line what was converted, and what was left and
        why: as a warning if something was left, else as info.

    Raises:
        ValueError: nothing was converted, and no layer is batch renorm already; or an option's value.
        TypeError: an option that is none of these.
    """
    if unknown := set(options) - {"momentum", "r_max", "d_max", "running_average"}:
        raise TypeError(
            f"convert_batchnorm: expected the options momentum, r_max, d_max and running_average, got "
            f"{', '.join(sorted(unknown))}"
        )
    BatchRenorm1d(1, device="meta", **options)  # raises, whatever the module holds
    classes = dict(classes or {})
    for given, target in classes.items():
        ours = isinstance(target, type) and issubclass(target, _BatchRenorm)
        if not isinstance(given, type) or (isinstance(target, type) and not ours) or not callable(target):
            raise TypeError(
                "classes: expected classes and what they become, a class of triton_brn's or a function of "
                f"the layer, got {given!r}: {target!r}"
            )
    cast: dict[Tensor, Tensor] = {}

    def decide(name: str, layer: nn.Module) -> Change | Left | None:
        target = classes.get(kind_of(layer))
        if isinstance(target, type):
            return _to_renorm(name, layer, target, options, cast)
        if target is not None:
            return _to_made(name, layer, target(layer))
        return _known(name, layer, options, cast)

    return change_all(module, decide, "BatchNorm", is_ours, "convert_batchnorm")


def _known(
    name: str, layer: nn.Module, options: dict[str, Any], cast: dict[Tensor, Tensor]
) -> Change | Left | None:
    if isinstance(layer, torch.jit.ScriptModule) and str(layer.original_name).startswith("BatchNorm"):
        return Left("scripted: convert first")
    if not isinstance(layer, _BatchNorm) or is_ours(layer):
        return None
    kind = kind_of(layer)
    norm, renorm, act, _ = next((p for p in _PAIRS if issubclass(kind, p[0])), (None, None, None, None))
    if kind.__name__.startswith("FSDP"):
        return Left("sharded by itself: convert before fully_shard")
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        return Left("not initialised: run a batch first")
    if norm is None or renorm is None or act is None:
        return Left("a class of its own: name it in classes=")
    if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
        return Left("without running statistics")
    if kind is norm:
        return _to_renorm(name, layer, renorm, options, cast)
    if is_norm_drop_act(layer, norm):
        return _to_renorm(name, layer, act, options, cast)
    return Left(f"a subclass of {norm.__name__} that may do more: name it in classes= if it does not")


def _to_made(name: str, layer: nn.Module, made: Any) -> Change:
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"classes: expected a module from the function of {type(layer).__name__}, got "
            f"{type(made).__name__} for {name or 'the module'}"
        )
    return Change(type(made), replacement=made)


def _to_renorm(
    name: str, layer: Any, kind: type[nn.Module], options: dict[str, Any], cast: dict[Tensor, Tensor]
) -> Change:
    buffers = dict(layer._buffers)
    missing = [n for n in ("running_mean", "running_var") if buffers.get(n) is None]
    if missing or not hasattr(layer, "eps"):
        raise ValueError(
            f"classes: expected layers with eps and the buffers running_mean and running_var, got "
            f"{type(layer).__name__} without {' and '.join(missing) or 'eps'} for {name or 'the module'}"
        )
    mean = buffers["running_mean"]
    buffers |= accumulators(mean, buffers["running_var"], buffers.get("num_batches_tracked"), cast)
    momentum = getattr(layer, "momentum", None)
    momentum = _MOMENTUM if momentum is None else min(momentum, _MOMENTUM)
    limits = _TRAINED if _is_trained(**buffers) else {}
    arguments = {"momentum": momentum, **limits, **options}
    try:
        like = kind(len(mean), layer.eps, device="meta", **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for {name or 'the module'}") from error
    learned = [n for n in ("weight", "bias") if getattr(layer, n, None) is not None]
    like.__dict__["affine"] = bool(learned)
    missing = [n for n in ("weight", "bias") if not hasattr(layer, n)]
    note = ""
    if isinstance(layer, nn.SyncBatchNorm):
        like.__dict__["_ranks"] = _ANY_RANK
        note = "SyncBatchNorm: each process now has statistics of its own"
    parameters = dict(layer._parameters) | dict.fromkeys(missing)
    return change(layer, like, note=note, _buffers=buffers, _parameters=parameters)


def _is_trained(
    running_mean: Tensor, running_var: Tensor, num_batches_tracked: Tensor, **others: Any
) -> bool:
    if running_mean.is_meta:
        return False
    moved = (running_mean != 0).any() or (running_var != 1).any()
    return bool(num_batches_tracked > 0) or bool(moved)


def revert_to_batchnorm(module: nn.Module, *, momentum: float | str | None = "auto") -> nn.Module:
    """The inverse of ``convert_batchnorm``: every layer becomes torch's BatchNorm of its rank.

    Outputs in eval, state_dicts, and all that ``convert_batchnorm`` keeps are kept; limits are dropped, so
    training is plain batch norm. Layers with an activation become timm's BatchNormAct2d if timm is imported,
    else a layer of ours that computes the same. What was a SyncBatchNorm is one again. Other classes
    are not restored: what came from a class of the user's becomes torch's BatchNorm too.

    Args:
        module: as for ``convert_batchnorm``.
        momentum: of every layer. By default 0.1, torch's own, for layers that have batch renorm's 0.01,
            and the layer's own for others.

    Returns:
        The model, or the new layer, as ``convert_batchnorm`` does. The same logger says what was done.

    Raises:
        ValueError: no layer is batch renorm, and none is BatchNorm already; or the momentum.
    """
    if momentum != "auto":
        check_numbers(momentum, 0.0, "std")  # type: ignore[arg-type]

    def decide(name: str, layer: nn.Module) -> Change | Left | None:
        return _to_norm(layer, momentum) if is_ours(layer) else None

    return change_all(module, decide, "BatchRenorm", _is_torchs, "revert_to_batchnorm")


def _is_torchs(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and not is_ours(layer)


def _to_norm(layer: Any, momentum: float | str | None) -> Change | Left:
    kind = kind_of(layer)
    theirs = kind.theirs if issubclass(kind, Kin) else None
    ours = kind.ours if issubclass(kind, Kin) else kind
    if "process_group" in vars(layer) and ours is BatchRenorm2d:
        norm: Any = nn.SyncBatchNorm
    else:
        norm = next((p[at] for p in _PAIRS for at, of in ((0, 1), (3, 2)) if ours is p[of]), None)
    if norm is None:
        return Left("a subclass that may do more")
    timm = sys.modules.get("timm.layers")
    if norm is activated.BatchNormAct2d and timm is not None:
        norm = timm.BatchNormAct2d
    if momentum == "auto":
        momentum = 0.1 if layer.momentum == _MOMENTUM else layer.momentum
    like = norm(layer.num_features, layer.eps, momentum, layer.affine, device="meta")
    like.track_running_stats = layer.track_running_stats
    if norm is nn.SyncBatchNorm:
        like.process_group = layer.process_group
    buffers = dict(layer._buffers)
    if layer.weight is not None and layer.weight.dtype in HALVES:  # beside it torch takes no float32 ones
        for name in ("running_mean", "running_var"):
            buffers[name] = None if buffers[name] is None else buffers[name].to(layer.weight.dtype)
    new = change(layer, like, kin(norm, theirs) if theirs else None, _buffers=buffers)
    new.without = _OURS - set(settings(like))
    return new


#: The attributes of ours that torch's BatchNorm does not have.
_OURS = frozenset(settings(BatchRenorm1d(1, device="meta"))) | {"_ranks"}
