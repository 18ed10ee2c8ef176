"""convert_batchrenorm: batch renorm layers of other packages become ours."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from .names import OF_STABLE_BASELINES, understand
from .ramp import Ramp
from .swap import Change, Left, accumulators, change, change_all, kind_of, share_hooks
from .validate import Average


def convert_batchrenorm(module: nn.Module) -> nn.Module:
    """Every batch renorm layer of torchrl, sb3-contrib or ludvb/batchrenorm in a model becomes ours.

    Copies of these layers in other packages are known by their attributes. Kept are parameters (the same
    objects), statistics, counter, momentum, eps, training flag, attributes and hooks; torchrl's and
    sb3-contrib's layers also stay the same objects. What they compute differs by this:

    - sb3-contrib: after warm-up it adds eps where it does not belong (``sqrt(var / r^2 + eps)``), and
      it normalises by the unbiased variance. The hard switch after ``warmup_steps`` becomes
      ``Ramp(1, 3, W + 1, W + 1)`` and ``Ramp(0, 5, W + 1, W + 1)``. The new layer is still an instance of
      its class, so ``set_bn_training_mode`` finds it: ``convert_batchrenorm(model.policy)`` and CrossQ
      trains with it. It saves its state under sb3-contrib's names, so zips go both ways.
    - torchrl: the switch at ``warmup_steps`` becomes ``Ramp(1, max_r, W, W)``; its correction, which doubles
      after each further ``warmup_steps``, stays what it is meant to be. ``smooth=True`` fades r and d in;
      here their limits rise over the same steps.
    - ludvb/batchrenorm: its fixed ramps are the paper's. eps is added to the standard deviation; here
      eps^2 to the variance, which agrees where one of the two is small. Outputs in eval are equal.

    Running variances are averaged where they were (``running_average="var"``), with Bessel's correction.

    Args:
        module: a model, which is changed and returned. If it is itself such a layer it stays what it is,
            and a new one that shares its tensors is returned.

    Returns:
        The model. The logger "triton_brn.convert" says what was done, as ``convert_batchnorm`` does.

    Raises:
        ValueError: there is no such layer, and none is ours already; or one that cannot be converted.
            Nothing was changed then.
    """
    return change_all(module, _decide, "batch renorm layer", is_ours, "convert_batchrenorm")


def is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchRenorm)


def _decide(name: str, layer: Any) -> Change | Left | None:
    if is_ours(layer):
        return None
    for buffers, attributes, convert in _FORMS:
        if all(hasattr(layer, n) for n in buffers + attributes):
            known = kind_of(layer).__name__.startswith("BatchRenorm")
            return convert(name, layer) if known else Left("a subclass that may do more")
    return None


def _of_torchrl(name: str, layer: Any) -> Change:
    steps = layer.warmup_steps
    begin = 0 if layer.smooth else steps
    like = _like(layer, BatchRenorm1d, "var")
    like.r_max, like.d_max = Ramp(1.0, layer.max_r, begin, steps), Ramp(0.0, layer.max_d, begin, steps)
    buffers = accumulators(layer.running_mean, layer.running_var, layer.num_batches_tracked, {})
    new = change(layer, like, _buffers=layer._buffers | buffers)
    new.without = frozenset({"max_r", "max_d", "warmup_steps", "smooth"})
    return new


def _of_stable_baselines(name: str, layer: Any) -> Change:
    _check_plain(name, layer, {"scale", "bias", "ra_mean", "ra_var", "steps"})
    after = layer.warmup_steps + 1
    like = _like(layer, BatchRenorm1d, "var")
    like.r_max, like.d_max = Ramp(1.0, layer.rmax, after, after), Ramp(0.0, layer.dmax, after, after)
    parameters, buffers = dict(layer._parameters), dict(layer._buffers)
    weight, bias = (parameters["scale"], parameters["bias"]) if layer.affine else (None, None)
    mean, var, steps = (buffers[n] for n in ("ra_mean", "ra_var", "steps"))
    new = change(
        layer,
        like,
        kin(BatchRenorm1d, type(layer)),
        _parameters={"weight": weight, "bias": bias},
        _buffers=accumulators(mean, var, steps, {}),
    )
    new.without = frozenset({"rmax", "dmax", "warmup_steps"})
    return new


def _of_ludvb(name: str, layer: Any) -> Change:
    _check_plain(name, layer, {"weight", "bias", "running_mean", "running_std", "num_batches_tracked"})
    rank = re.search(r"[123](?=d$)", type(layer).__name__, re.IGNORECASE)
    if rank is None:
        raise ValueError(
            f"convert_batchrenorm: expected a class of 1d, 2d or 3d, got {type(layer).__name__} for "
            f"{name or 'the module'}"
        )
    kind = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)[int(rank[0]) - 1]
    eps = layer.eps**2
    like = _like(layer, kind, "std", eps=eps)
    var = (layer.running_std.square() - eps).clamp(min=0)
    buffers = accumulators(layer.running_mean, var, layer.num_batches_tracked, {})
    affine = layer.affine
    parameters = {"weight": layer.weight if affine else None, "bias": layer.bias if affine else None}
    if not isinstance(layer, torch.jit.ScriptModule):
        return change(layer, like, _parameters=parameters, _buffers=buffers)
    like.__dict__.update(_parameters=parameters, _buffers=buffers, training=layer.training)
    share_hooks(layer, like)
    return Change(kind, replacement=like)  # a ScriptModule cannot change its class


def _like(layer: Any, kind: type[_BatchRenorm], average: Average, eps: float | None = None) -> _BatchRenorm:
    features = len(layer.bias)
    like = kind(
        features, layer.eps if eps is None else eps, layer.momentum, device="meta", running_average=average
    )
    like.affine = getattr(layer, "affine", True)
    return like


def _check_plain(name: str, layer: nn.Module, names: set[str]) -> None:
    got = {n for n, _ in (*layer.named_buffers(recurse=False), *layer.named_parameters(recurse=False))}
    if got != names or len(list(layer.children())):
        raise ValueError(
            f"convert_batchrenorm: expected the tensors {', '.join(sorted(names))} in "
            f"{name or 'the module'}, got {', '.join(sorted(got))}: remove pruning and parametrizations first"
        )


#: How a layer is known: its buffers, its attributes.
_FORMS = (
    (("running_mean", "running_var"), ("max_r", "max_d", "warmup_steps", "smooth"), _of_torchrl),
    (("ra_mean", "ra_var", "steps"), ("rmax", "dmax", "warmup_steps"), _of_stable_baselines),
    (("running_mean", "running_std"), ("rmax", "dmax", "num_batches_tracked"), _of_ludvb),
)


class Kin(nn.Module):
    """What marks an instance of another package's class that computes as ``ours`` does."""

    ours: type[nn.Module]
    theirs: type[nn.Module]
    eps: float
    affine: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.ours, self.theirs), self.__dict__

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in destination:
                theirs = prefix + OF_STABLE_BASELINES.get(name, name)
                destination[theirs] = destination.pop(prefix + name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        understand(state_dict, prefix, self.eps, self.affine)
        super()._load_from_state_dict(state_dict, prefix, *args)


_kins: dict[tuple[Any, Any], Any] = {}


def kin(ours: Any, theirs: Any) -> Any:
    """A class that computes as ``ours`` does and that isinstance takes for ``theirs``, sb3-contrib's.

    sb3-contrib trains the layers that are instances of its class, and no others.
    """
    if (ours, theirs) not in _kins:
        own = {"ours": ours, "theirs": theirs, "__doc__": ours.__doc__}
        _kins[ours, theirs] = type(ours.__name__, (Kin, ours, theirs), own)
    return _kins[ours, theirs]


def _blank(ours: type[nn.Module], theirs: type[nn.Module]) -> nn.Module:
    kind = kin(ours, theirs)
    return kind.__new__(kind)
