"""Where the programs of a launch meet and exchange numbers: a buffer for each device, stream and dtype.

The words that programs meet at keep their values from launch to launch (kernels/barrier.py). Were they handed
to anybody else meanwhile, a program would wait for ever. So a buffer

- is never part of a pool that others draw from again. ``torch.cuda.use_mem_pool``, and torch.compile's
  mode="reduce-overhead" while it warms up, redirect what the *current thread* allocates into such a pool. A
  buffer is therefore allocated by a thread of its own.
- serves launches of one stream, which take turns, whatever the threads they come from. It is allocated on
  that stream: should it be freed, torch gives it to nobody whom the stream does not come before. A stream
  that was destroyed has ended its work when CUDA reuses its handle.
- is kept out of what is captured in a CUDA graph, whose replays may run on other streams. What a captured
  launch uses comes from the graph's own pool, lives as long as the graph, and is cleared by its replay.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .views import power_of_two

#: Elements of a buffer at least, so that it seldom grows.
LEAST = 1 << 14
_buffers: dict[Any, Tensor] = {}


def buffer(x: Tensor, size: int, dtype: torch.dtype, stream: int | None) -> Tensor:
    """At least ``size`` zeros on x's device, which the kernels leave so where they need them so.

    stream: the handle of the current stream; None: for launches that share nothing with others.
    """
    if stream is None:  # Zeroed by a graph's replay, not now. Only the words need it.
        make = torch.zeros if dtype == torch.int32 else torch.empty
        return make(size, dtype=dtype, device=x.device)
    key = (x.device, stream, dtype)
    found = _buffers.get(key)
    if found is None or found.numel() < size:
        found = _buffers[key] = made_apart(max(LEAST, power_of_two(size)), dtype, x.device)
    return found


def made_apart(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``size`` zeros, allocated on the current stream by a thread that ends with it."""
    stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)

    def make() -> Tensor:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        return torch.zeros(size, dtype=dtype, device=device)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()
