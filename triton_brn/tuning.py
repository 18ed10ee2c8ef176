"""tune: find the fastest launch plans for a model, or for shapes, and store them in the device's table."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import planner, progress
from .backend import obstacle, uses_triton, without_autotuning
from .modules import _BatchRenorm
from .tuning_table import DIRECTIONS
from .validate import DTYPES
from .views import view_of


@dataclass(frozen=True)
class Size:
    """What a layer is given, or a search: a dense tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one direction of one shape.

    Attributes:
        direction: "forward", "backward" or "inference".
        shape, dtype, layout: of the input; layout is "contiguous", "channels_last" or "other".
        us: microseconds of a call by the plan that was chosen.
        default_us: microseconds of a call by the planner's own.
        strategy: of the chosen plan, "default" where none was faster than the planner's own.
        news: False where the table had it already.
        finished: False where the budget ended before everything had been tried.
    """

    direction: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    us: float
    default_us: float
    strategy: str
    news: bool
    finished: bool


def tune(
    model_or_shapes: nn.Module | Iterable[Sequence[int]],
    *inputs: Any,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: torch.device | str | None = None,
    directions: Sequence[str] = DIRECTIONS,
    budget: float = math.inf,
    progress: bool = False,
) -> list[Tuned]:
    """Find the fastest launch plans and store them in this device's tuning table.

    Everything runs on scratch tensors: parameters, running statistics and torch's random numbers stay as
    they are. What the table has already is not tuned again. The plans serve all later calls of similar
    size, in this process and in others; they add in another order, so results change by their rounding.

    Args:
        model_or_shapes: a model, of whose BatchRenorm layers the inputs' shapes, dtypes and layouts are
            recorded during one forward of a copy; or input shapes, (N, C) or (N, C, ...).
        inputs: the model's. Tensors, also those in lists, tuples and dicts, are cloned.
        dtype, channels_last, device: of the shapes' tensors; the device is by default the one that
            Triton serves. Layouts other than 4-D and 5-D know no channels_last.
        directions: which of "forward", "backward" and "inference" to tune.
        budget: seconds, after which the search ends; what is left waits for the next call.
        progress: show a progress bar (needs tqdm).

    Returns:
        What was found for each direction of each distinct input, in order, as far as the budget went.

    Raises:
        TypeError, ValueError: an argument that cannot be served, by name.
        RuntimeError: Triton does not serve the device, or has no memory for a shape, or a
            ``forced_strategy`` block is open.
        OSError: the table cannot be read or written. It is tried before a search begins.
        ImportError: ``progress`` without tqdm.
    """
    deadline = time.monotonic() + seconds(budget)
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"directions: expected any of {', '.join(DIRECTIONS)}, got {direction!r}")
    if strategy := planner.forced():
        raise RuntimeError(f"tune: forced_strategy({strategy!r}) leaves nothing to choose")
    if isinstance(model_or_shapes, nn.Module):
        sizes = recorded(model_or_shapes, inputs)
    elif inputs:
        raise TypeError("inputs: only a model takes inputs")
    elif not isinstance(model_or_shapes, Iterable):
        raise TypeError(f"model_or_shapes: expected a model or shapes, got {model_or_shapes!r}")
    else:
        sizes = [size_of(shape, dtype, channels_last, device) for shape in model_or_shapes]
    for size in sizes:
        check_served(size.device)
    wanted = [(direction, size) for size in dict.fromkeys(sizes) for direction in directions]
    results: list[Tuned] = []
    with bar(len(wanted), progress) as shown:
        for direction, size in wanted:
            if time.monotonic() >= deadline:
                break
            shown.set_postfix_str(f"{direction} {'x'.join(map(str, size.shape))}")
            results.append(tuned(direction, size, deadline))
            shown.update()
    return results


def tuned(direction: str, size: Size, deadline: float) -> Tuned:
    """What the table has, or what a search finds and stores there."""
    from . import launch, tuning_table
    from .search import searched, timed
    from .tuned import place

    view = view_of(size.shape, size.stride)
    assert view is not None, "recorded sizes are dense"
    name, key = place(direction, view, torch.empty(0, dtype=size.dtype, device=size.device))
    entry = tuning_table.look_up(name, key)
    news = entry is None or not entry.finished
    if entry is None or news:
        begun = view if entry is None else entry.view  # a search that a similar size began goes on
        stride = (begun.channels * begun.inner, begun.inner, 1)
        alike = replace(size, shape=tuple(begun), stride=stride)
        tuning_table.check_usable(name)
        found = searched(direction, alike, deadline, entry)
        tuning_table.save(name, {key: found})
        launch.forget_calls()
        entry = tuning_table.look_up(name, key) or found  # another process may have finished it
    times = (entry.us, entry.default_us, "default" if entry.choice is None else entry.choice.strategy)
    if entry.view != view:  # the plan serves this size too: how well?
        times = timed(direction, size, entry.choice)
    dtype = str(size.dtype).removeprefix("torch.")
    return Tuned(direction, size.shape, dtype, layout_of(size), *times, news, entry.finished)


def recorded(model: nn.Module, inputs: tuple[Any, ...]) -> list[Size]:
    """The inputs of a model's BatchRenorm layers. A copy runs, on copies, so that nothing is updated."""
    found: list[Size] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        stride = x.stride() if view_of(x.shape, x.stride()) else torch.empty_like(x, device="meta").stride()
        if x.numel():
            found.append(Size(tuple(x.shape), tuple(stride), x.dtype, x.device))

    replica = copy.deepcopy(model)
    layers = [module for module in replica.modules() if isinstance(module, _BatchRenorm)]
    if not layers:
        raise ValueError("model_or_shapes: the model has no BatchRenorm layer")
    for layer in layers:
        layer.register_forward_pre_hook(record, with_kwargs=True)
    clones = tree_map_only(torch.Tensor, torch.clone, inputs)
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(clones)]
    gpus = {t.device.index for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda}
    with torch.random.fork_rng(sorted(gpus)), torch.no_grad(), without_autotuning():
        replica(*clones)
    if not found:
        raise ValueError("inputs: the model gave its BatchRenorm layers none")
    return found


def size_of(
    shape: Sequence[int], dtype: torch.dtype, channels_last: bool, device: torch.device | str | None
) -> Size:
    """The size of a shape's tensor."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"model_or_shapes: expected shapes (N, C, ...), got {shape!r} among them")
    shape = tuple(shape)
    if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"model_or_shapes: expected shapes (N, C, ...) of positive integers, got {shape}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    memory_format = torch.contiguous_format
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if len(shape) not in formats:
            raise ValueError(f"channels_last: only 4-D and 5-D tensors have it, got shape {shape}")
        memory_format = formats[len(shape)]
    stride = torch.empty(shape, device="meta").to(memory_format=memory_format).stride()
    return Size(shape, stride, dtype, served_device() if device is None else torch.device(device))


def served_device() -> torch.device:
    """The device that Triton serves."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type)


def check_served(device: torch.device) -> None:
    """Raise RuntimeError where no kernels run, and so nothing can be tuned."""
    if not uses_triton(device):
        why = obstacle(device.type) or "TRITON_BRN_BACKEND=eager"
        raise RuntimeError(f"nothing to tune on {device}, which plain PyTorch serves: {why}")


def seconds(budget: float) -> float:
    """A budget that is one."""
    if not budget > 0:
        raise ValueError(f"budget: expected more than 0 seconds, got {budget}")
    return budget


def layout_of(size: Size) -> str:
    """The layout's name."""
    x = torch.empty_strided(size.shape, size.stride, device="meta")
    if x.is_contiguous():
        return "contiguous"
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return "channels_last" if last and x.is_contiguous(memory_format=last) else "other"


class _NoBar:
    """In place of a progress bar."""

    def update(self) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


@contextmanager
def bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar, if one is to be shown."""
    if not shown:
        yield _NoBar()
        return
    try:
        made = progress.bar(total, "call")
    except ImportError as error:
        raise ImportError(f"a progress bar needs tqdm: {progress.how_to_install('tune')}") from error
    with made as drawn:
        yield drawn
