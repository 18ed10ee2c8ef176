"""How the layers of a model become others: everything is decided first, then everything is changed.

A layer changes its class and stays the object that it is. So its hooks and their handles, parametrizations,
pruning, attributes, optimizers, compiled models and whoever else holds it need not be told.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .validate import statistics_dtype

_log = logging.getLogger("triton_brn.convert")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass
class Change:
    """What one layer becomes: an instance of ``kind``, or the object ``replacement``."""

    kind: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    replacement: nn.Module | None = None
    note: str = ""

    def make(self, layer: nn.Module) -> None:
        for name in self.without:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(self.attributes)
        layer.__class__ = self.kind


@dataclass
class Left:
    """Why a layer stays what it is."""

    reason: str


#: Of a layer, by its name and itself. None: it is not what is looked for.
Decide = Callable[[str, nn.Module], Change | Left | None]


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The layer's class. (A parametrized layer has a subclass of its own.)"""
    return parametrize.type_before_parametrizations(layer)


def settings(layer: nn.Module) -> dict[str, Any]:
    """The attributes that nn.Module itself does not have."""
    return {name: value for name, value in vars(layer).items() if name not in _OF_EVERY_MODULE}


def change(
    layer: nn.Module, like: nn.Module, kind: type[nn.Module] | None = None, note: str = "", **tensors: Any
) -> Change:
    """A layer gets the class (or ``kind``), the settings, and the children it lacks, of ``like``.

    ``tensors`` are its new ``_buffers`` and ``_parameters``.
    """
    kind = kind or type(like)
    if parametrize.is_parametrized(layer):  # its tensors are properties of its class
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__doc__", "__module__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    object.__setattr__(object.__new__(type(layer)), "__class__", kind)  # what Python refuses, it refuses now
    attributes = settings(like) | tensors
    if like._modules:
        attributes["_modules"] = dict(like._modules) | layer._modules
    return Change(kind, attributes, note=note)


def accumulators(
    mean: Tensor, var: Tensor, steps: Tensor | None, cast: dict[Tensor, Tensor]
) -> dict[str, Tensor]:
    """A layer's buffers as ours need them: the same tensors if they can be. ``cast`` keeps shared ones so."""
    for t in (mean, var):
        if t not in cast:
            fits = t.dtype == statistics_dtype(t.dtype) and t.is_contiguous() and not t.requires_grad
            cast[t] = t if fits else t.detach().to(statistics_dtype(t.dtype)).contiguous()
    if steps is None:
        steps = torch.zeros((), dtype=torch.long, device=mean.device)
    steps = steps if steps.dtype == torch.long else steps.long()
    return {"running_mean": cast[mean], "running_var": cast[var], "num_batches_tracked": steps}


def change_all(
    root: nn.Module, decide: Decide, sought: str, is_done: Callable[[nn.Module], bool], caller: str
) -> nn.Module:
    """Decide for every layer of a model, then change those that get a Change, and say so in one line.

    Args:
        root: the model. Where it is itself a layer that changes, a twin of it changes instead.
        decide: what is to become of a layer. It changes nothing.
        sought: what is looked for, in words.
        is_done: whether a layer is what it would become.
        caller: a function's name for messages.

    Raises:
        ValueError: nothing changes, and no layer is done either.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(root).__name__}")
    modules = list(root.modules())
    changes: dict[nn.Module, Change] = {}
    left: dict[str, list[str]] = {}
    within: set[nn.Module] = set()
    for name, layer in root.named_modules():
        decision = None if layer in within else decide(name, layer)
        if isinstance(decision, Left):
            left.setdefault(f"{kind_of(layer).__name__}, {decision.reason}", []).append(name or "itself")
        elif decision is not None:
            changes[layer] = decision
            if decision.replacement is not None:
                within.update(layer.modules())
    there = any(is_done(m) for m in modules)
    line = _summary(caller, sought, changes, left, there)
    if not changes and not there:
        raise ValueError(line)
    replaced = {layer: c.replacement for layer, c in changes.items() if c.replacement is not None}
    _check_holders(modules, replaced, caller)
    loud = left or any(c.note for c in changes.values())
    result = _make(root, modules, changes, replaced)
    _log.log(logging.WARNING if loud else logging.INFO, "%s", line)
    return result


def _make(
    root: nn.Module,
    modules: list[nn.Module],
    changes: dict[nn.Module, Change],
    replaced: dict[nn.Module, nn.Module],
) -> nn.Module:
    for parent in modules:
        for name, child in parent._modules.items() if replaced else ():
            if child in replaced:
                parent._modules[name] = replaced[child]
    for layer, decision in changes.items():
        if layer not in replaced:
            if layer is root:
                root = layer = twin(layer)
            decision.make(layer)
    return replaced.get(root, root)


def twin(layer: nn.Module) -> nn.Module:
    """Another layer with the same tensors, children and hooks."""
    new = object.__new__(type(layer))
    new.__dict__.update(vars(layer))
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(vars(layer)[name])
    share_hooks(layer, new)
    return new


def share_hooks(layer: nn.Module, new: nn.Module) -> None:
    """``new`` has the hooks of ``layer``, in the same dicts, so that their handles still remove them."""
    for name in vars(layer):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            new.__dict__[name] = vars(layer)[name]
    new.__dict__["_load_state_dict_pre_hooks"] = hooks = type(layer._load_state_dict_pre_hooks)()
    for key, hook in layer._load_state_dict_pre_hooks.items():
        of_layer: Any = hook  # torch wraps it, with a reference to the layer
        hooks[key] = type(of_layer)(of_layer.hook, new) if getattr(hook, "with_module", False) else hook


def _check_holders(modules: list[nn.Module], replaced: dict[nn.Module, nn.Module], caller: str) -> None:
    """Lists and plain attributes are no part of the tree in which a layer is replaced."""
    for module in modules if replaced else ():
        for name, value in vars(module).items():
            held = list(value.values()) if isinstance(value, dict) else value
            held = held if isinstance(held, (list, tuple)) else [held]
            if name != "_modules" and any(isinstance(v, nn.Module) and v in replaced for v in held):
                raise ValueError(
                    f"{caller}: a layer that is replaced is also held by {type(module).__name__}.{name}, "
                    "outside the tree of modules: make that an nn.ModuleList, or set it after the conversion"
                )


def _summary(
    caller: str, sought: str, changes: dict[nn.Module, Change], left: dict[str, list[str]], there: bool
) -> str:
    counts = Counter(_from_to(kind_of(layer), c.kind) for layer, c in changes.items())
    if counts:
        kinds = ", ".join(f"{count} {kinds}" for kinds, count in counts.items())
        parts = [f"{len(changes)} converted ({kinds})"]
    else:
        why = "" if left else ": it was before" if there else f": the module has no {sought}"
        parts = [f"nothing was converted{why}"]
    for why, names in left.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{len(names)} left ({', '.join(names[:3])}{more}: {why})")
    parts += sorted({c.note for c in changes.values() if c.note})
    return f"{caller}: " + "; ".join(parts)


def _from_to(old: type[nn.Module], new: type[nn.Module]) -> str:
    package = f"{old.__module__.partition('.')[0]}'s " if old.__name__ == new.__name__ else ""
    return f"{package}{old.__name__} to {new.__name__}"
