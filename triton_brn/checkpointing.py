"""Activation checkpointing: a forward that runs again in the backward normalises as it did the first time.

A checkpointed segment runs twice: first to give its output, again in the backward for what autograd needs.
The second time the running statistics have been updated, so r, d and every gradient would be others, and the
statistics would be updated twice. So the first pass leaves each call's numbers, a few per channel, with the
object that stands for the segment, and the recomputation takes them from there: one pass over x, no sums.

Two kinds of object stand for a segment, and neither needs the user's help:

- ``ctx`` of a torch.autograd.Function whose forward ran the segment and whose backward runs it again
  (``use_reentrant=True`` and the checkpointing of other libraries);
- the ``_CheckpointFrame`` of ``use_reentrant=False``, which its saved-tensor hooks hold on to.

Numbers live as long as that object: until the graph is freed.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _current_graph_task_id, _is_fwd_grad_enabled
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.function import BackwardCFunction, Function

from . import saved_tensor_hooks

#: Python code that autograd runs: a Function's forward, its backward, the engine.
_FORWARD = Function.apply.__code__
_BACKWARD = tuple(
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
)
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
#: By their ids; those of saved-tensor hooks that are not known join when seen, for one may recompute.
_MARKS: dict[int, CodeType] = {id(code): code for code in (_FORWARD, *_BACKWARD, _ENGINE)}
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_ATTRIBUTE = "_triton_brn_segment"
#: Recomputations of one segment whose positions are kept: as many as may run at a time, and more.
_RUNS = 64

_segments: weakref.WeakSet[Segment] = weakref.WeakSet()


@dataclass
class Kept:
    """What a training call leaves for its recomputation."""

    shape: torch.Size
    dtype: torch.dtype
    numbers: Any  # what the backend saved
    learned: bool  # whether the running statistics have been updated by it


class Segment:
    """The training calls of a checkpointed segment, by layer and in order."""

    def __init__(self) -> None:
        self.task = _current_graph_task_id()
        self.calls: dict[int, list[Kept]] = {}
        self.taken: dict[Any, dict[int, int]] = {}
        _segments.add(self)

    def add(self, layer: int, kept: Kept) -> None:
        self.calls.setdefault(layer, []).append(kept)

    def take(self, layer: int, run: Any) -> Kept | None:
        """The layer's next call in this run of the segment; None: it made fewer."""
        if run not in self.taken:
            if len(self.taken) >= _RUNS:
                del self.taken[next(iter(self.taken))]
            self.taken[run] = {}
        position = self.taken[run].get(layer, 0)
        calls = self.calls.get(layer, ())
        if position == len(calls):
            return None
        self.taken[run][layer] = position + 1
        return calls[position]


def segment_of(owner: Any) -> Segment:
    """The segment that a Function's ctx or a checkpoint's frame stands for."""
    segment: Segment | None = owner.__dict__.get(_ATTRIBUTE)
    if segment is None:
        segment = Segment()
        setattr(owner, _ATTRIBUTE, segment)
    return segment


class Place(NamedTuple):
    """Where a training call stands: what it repeats, and who may repeat it later."""

    layer: int
    source: Segment | None  # the segment that is being recomputed
    run: Any  # which recomputation of it
    what: str  # the source, for messages
    later: list[Segment]  # segments whose first pass this is
    ahead: bool = False  # whether the source's first pass goes on: it called for a backward

    def again(self, x: Tensor) -> Kept | None:
        """What this call left when it ran first; None: this is its first time.

        Raises:
            RuntimeError: it did not run first, or otherwise.
        """
        if self.source is None:
            return None
        kept = self.source.take(self.layer, self.run)
        if kept is None:
            if self.ahead:
                raise torch.utils.checkpoint._StopRecomputationError  # it has made all that is asked for
            if not torch.is_grad_enabled() and self.layer not in self.source.calls:
                return None  # nothing is differentiated: no recomputation
            raise RuntimeError(_MISSING.format(self.what))
        if (kept.shape, kept.dtype) != (x.shape, x.dtype):
            raise RuntimeError(
                _OTHER.format(self.what, tuple(kept.shape), kept.dtype, tuple(x.shape), x.dtype)
            )
        for segment in self.later:
            segment.add(self.layer, kept)
        return kept

    def keep(self, x: Tensor, numbers: Any, momentum: float) -> None:
        """Leave the numbers of a first pass."""
        kept = Kept(x.shape, x.dtype, numbers, momentum != 0)
        for segment in self.later:
            segment.add(self.layer, kept)


_CURE = (
    "Use torch.utils.checkpoint.checkpoint, with the same calls in both passes and the layers in one mode;"
    " layers that shall not learn there belong in eval mode."
)
_MISSING = (
    "batch_renorm: the recomputation inside {} calls a layer in training that its first pass did not call, or"
    " more often: there are no statistics of a first pass to take. " + _CURE
)
_OTHER = (
    "batch_renorm: a training call inside {} has another input than in the first pass: expected {} of {},"
    " got {} of {}. " + _CURE
)
_IN_HOOK = (
    "batch_renorm: a training call in a hook of the backward, of a layer that ran in a checkpointed segment:"
    " whether it recomputes that segment cannot be told. " + _CURE
)
_IN_UNPACK = (
    "batch_renorm: a training call inside {}, a saved-tensor hook that is not torch's checkpointing: what it"
    " recomputes cannot be told. " + _CURE
)
_COMPILED = (
    "batch_renorm: {}, which torch.compile made, computes a training call again and would update the running"
    " statistics twice. Checkpoint around the compiled module, not within. If an earlier triton_brn left the"
    " graph in the compiler's cache, clear it (TORCHINDUCTOR_CACHE_DIR)."
)
_ELSEWHERE = (
    "batch_renorm: a training call is recomputed inside {}, in {}, which takes no numbers of a first pass."
    " Leave out one of the two, or call eval() first."
)


def acts() -> bool:
    """Whether a forward that runs now may run again, or runs again: 0.15 us to see that it does not."""
    return (
        saved_tensor_hooks.top(True) is not None
        or _current_graph_task_id() >= 0
        or not _is_fwd_grad_enabled()  # in a Function's forward
    )


def trained(running_mean: Tensor) -> bool:
    """Whether the call that runs now recomputes a training call, whatever its layer's mode is now."""
    if _current_graph_task_id() < 0 and saved_tensor_hooks.top(True) is None:
        return False
    here = place(layer_of(running_mean))
    return here.source is not None and here.layer in here.source.calls


#: The layer of all calls from compiled graphs, which may pass copies of the statistics: they are told by
#: their order alone, which the graph keeps.
IN_A_GRAPH = 0


def layer_of(running_mean: Tensor) -> int:
    """What tells a layer's calls from others': where its statistics are."""
    return running_mean.data_ptr() if type(running_mean) in PLAIN_TENSORS else id(running_mean)


def place(layer: int) -> Place:
    """Where the training call of this layer that runs now stands.

    Python's frames, innermost first, say which segments it is in the first pass of, up to the backward or
    the recomputation that it is part of; the stack of saved-tensor hooks says it of ``use_reentrant=False``.
    """
    later: list[Segment] = []
    recomputed, run = checkpoints(later)
    task = _current_graph_task_id()
    if task < 0 and recomputed is None and _is_fwd_grad_enabled():  # in no Function: no frames to look at
        return Place(layer, None, None, "", later)
    frame: FrameType | None = sys._getframe(1)
    inner: FrameType | None = None
    in_forward = task < 0 and saved_tensor_hooks.top(True) is None
    while frame is not None:
        code = frame.f_code
        if id(code) in _MARKS or code.co_name == "unpack_hook":
            if code is not _FORWARD:
                break
            ctx = context_of(inner)
            if is_compiled(ctx):
                if in_forward:  # with gradients, so in nobody's first pass: 60 frames less to look at
                    return Place(layer, None, None, "", later)
            elif ctx is not None:
                later.append(segment_of(ctx))
        inner, frame = frame, frame.f_back
    if frame is None or frame.f_code is _ENGINE:
        if task >= 0 and any(layer in segment.calls for segment in _segments):
            raise RuntimeError(_IN_HOOK)
        return Place(layer, None, None, "", later)
    if frame.f_code in _BACKWARD:
        ctx = frame.f_locals["self"]
        what = f"the backward of {function_of(ctx).__name__}"
        if is_compiled(ctx):
            raise RuntimeError(_COMPILED.format(what))
        return Place(layer, segment_of(ctx), task, what, later)
    if recomputed is None:
        raise RuntimeError(_IN_UNPACK.format(frame.f_code.co_name))
    ahead = not getattr(recomputed, "forward_completed", True)
    return Place(layer, segment_of(recomputed), run, "torch.utils.checkpoint", later, ahead)


def refuse_recomputation(running_mean: Tensor, where: str) -> None:
    """Raise a RuntimeError if the training call that runs now is a recomputation."""
    while is_functorch_wrapped_tensor(running_mean):
        running_mean = get_unwrapped(running_mean)
    here = place(layer_of(running_mean))
    if here.source is not None:
        raise RuntimeError(_ELSEWHERE.format(here.what, where))


def context_of(forward: FrameType | None) -> Any:
    """The ctx of a Function.forward that runs, or None: it has none, or is one of ours."""
    if forward is None:
        return None
    code, arguments = forward.f_code, forward.f_locals
    ctx = arguments.get(code.co_varnames[0]) if code.co_argcount else None
    if not code.co_argcount and code.co_flags & inspect.CO_VARARGS:
        ctx = next(iter(arguments.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    if not isinstance(ctx, BackwardCFunction):
        return None
    return None if function_of(ctx).__module__.startswith(__package__) else ctx


def function_of(ctx: Any) -> Any:
    return ctx._forward_cls


def is_compiled(ctx: Any) -> bool:
    """Whether a Function is what torch.compile made of a graph: its passes are the compiler's."""
    return ctx is not None and hasattr(function_of(ctx), "_aot_id")


def checkpoints(later: list[Segment]) -> tuple[Any, Any]:
    """The ``_CheckpointFrame`` that is being recomputed and its hook, if any. Those above it on the stack of
    hooks, whose first pass this is, join ``later``."""
    task = _current_graph_task_id()
    for pack, unpack in saved_tensor_hooks.stack():
        owner = saved_tensor_hooks.checkpoint_frame(pack)
        if owner is None:
            code = getattr(unpack, "__code__", None)
            if code is not None:
                _MARKS[id(code)] = code
        elif "_recomputation_hook" in pack.__qualname__:
            return owner, pack
        elif (segment := segment_of(owner)).task == task:  # else it is outside this backward
            later.append(segment)
    return None, None


class _Acting(threading.local):
    call: tuple[Place, Kept | None] | None = None


_acting = _Acting()


@contextmanager
def acting(where: Place, kept: Kept | None) -> Iterator[None]:
    """The operator that is called inside is the call at this place, whichever mode lets it through."""
    _acting.call = where, kept
    try:
        yield
    finally:
        _acting.call = None


def call_of(x: Tensor) -> tuple[Place, Kept | None]:
    """The place of an operator's call and, if it is a recomputation, what its first pass left."""
    if _acting.call is not None:
        return _acting.call
    where = place(IN_A_GRAPH)
    return where, where.again(x)
