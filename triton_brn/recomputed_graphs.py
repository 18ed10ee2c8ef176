"""torch.compile around a checkpointed segment: its backward normalises again, by statistics that were saved.

The compiler traces the segment once, with the dispatch modes of selective checkpointing, which tag each
operation as one to save or to compute again in the backward. One that updates the running statistics must
not be computed again; but its y must, or checkpointing would save no memory. So ``forward`` is traced as
``statistics``, a few numbers per channel that are saved, and ``normalise``, tagged as the user's policy says.
So it is where the compiler itself chooses what to save (torch._functorch.config.activation_memory_budget).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch.utils.checkpoint
from torch._functorch import config
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import ops


def _in_halves(mode: Any, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
    """``forward`` under a mode of selective checkpointing, or of a compiler that has a budget of memory."""
    proxies = get_proxy_mode()
    again = not isinstance(mode, FunctionalTensorMode) or config.activation_memory_budget < 1
    if proxies is None or not again:  # where nobody traces checkpointing.py sees to it
        return mode.__torch_dispatch__(function, types, args, kwargs or {})
    nodes = proxies.tracer.graph.nodes  # type: ignore[attr-defined]
    before = len(nodes)
    with mode:
        saved = ops.OPS.statistics(*args)
    for node in itertools.islice(reversed(nodes), len(nodes) - before):
        node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    with mode:
        return ops.OPS.normalise(*args[:3], saved), saved


def register() -> None:
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode"):  # the two passes
        if hasattr(torch.utils.checkpoint, name):  # else compiled backwards refuse to compute forward again
            ops.dispatch("forward", getattr(torch.utils.checkpoint, name), _in_halves)
    ops.dispatch("forward", FunctionalTensorMode, _in_halves)
