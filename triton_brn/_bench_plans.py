"""How our layer runs an input: by which strategy, and whose plan that is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .backend import uses_triton


def plans_of(x: Tensor, direction: str) -> list[tuple[str, str]]:
    """(strategy, who planned it) of each plan, forward before backward.

    Who: "planner"; "tuned"; "retreat", where the programs of that plan would not have run at the same time.
    Without kernels: ("eager", "").
    """
    if not uses_triton(x.device):
        return [("eager", "")]
    from . import launch, planner
    from .tuned import tuned_plan

    statistics_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = []
    for one in ("forward", "backward") if direction == "both" else (direction,):
        dense, call = launch.prepared(one, x.detach(), statistics_dtype)
        if call.plan == planner.plan(one, call.view, x.element_size(), call.device):
            who = "planner"
        else:
            who = "tuned" if call.plan == tuned_plan(one, call.view, dense, call.device) else "retreat"
        found.append((call.plan.strategy, who))
    return found


def joined(names: Iterable[str]) -> str:
    """Each name once, in this order."""
    return " + ".join(dict.fromkeys(names))
