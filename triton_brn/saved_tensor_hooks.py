"""The stack of saved-tensor hooks, by which ``use_reentrant=False`` checkpoints."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch.utils.checkpoint
from torch._C import _autograd

#: The innermost hooks of this thread, (pack, unpack), or None; also while torch traces.
top = _autograd._top_saved_tensors_default_hooks

_UNKNOWN = "batch_renorm: this torch checkpoints in a way that is not known ({}). Pass use_reentrant=True."


def stack() -> list[tuple[Any, Any]]:
    """This thread's saved-tensor hooks, innermost first. torch shows the innermost only."""
    if not _autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return []
    found = []
    while (pair := top(True)) is not None:
        found.append(pair)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(found):
        _autograd._push_saved_tensors_default_hooks(*pair)
    return found


def checkpoint_frame(pack: Any) -> Any:
    """The ``_CheckpointFrame`` that a saved-tensor hook closes over or refers to weakly, or None."""
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__name__ == "_CheckpointFrame":
            return held
    if getattr(pack, "__module__", "") == torch.utils.checkpoint.__name__:
        raise RuntimeError(_UNKNOWN.format(pack.__qualname__))
    return None
