"""The plan of a call: what tuning chose for such sizes, else the planner's. Asked once per kind of call."""

from __future__ import annotations

import logging
import threading
import warnings

from torch import Tensor

from . import candidates, planner, tuning_table
from .backend import autotunes
from .devices import capturing, table_name
from .plans import Device, Plan
from .tuning_table import Entry
from .views import View

_log = logging.getLogger(__name__)


def tuned_plan(direction: str, view: View, x: Tensor, device: Device) -> Plan:
    """The plan for ``direction`` on x. With TRITON_BRN_AUTOTUNE=1, tunes first what nobody has tuned."""
    analytic, tunes = planner.plan(direction, view, x.element_size(), device), autotunes()
    if planner.forced():
        return analytic
    name, key = place(direction, view, x)
    entry = tuning_table.look_up(name, key)
    if entry is None and tunes and not capturing(x):
        entry = autotuned(direction, view, x, name, key)
    return chosen(entry, direction, view, x, device) or analytic


def place(direction: str, view: View, x: Tensor) -> tuple[str, str]:
    """Where tables have a call: device and key."""
    return table_name(x), tuning_table.key(
        direction, str(x.dtype).removeprefix("torch."), view, x.element_size()
    )


def chosen(entry: Entry | None, direction: str, view: View, x: Tensor, device: Device) -> Plan | None:
    """The plan that an entry makes of a call; None for the planner's own."""
    if entry is None or entry.choice is None:
        return None
    plan = candidates.planned(entry.choice, direction, view, x.element_size(), device)
    if plan is None:
        _log.debug("%s: the tuned %s does not serve %s", direction, entry.choice, view)
    return plan


_tuning = threading.RLock()  # autograd runs the backward in a thread of its own
_tried: dict[tuple[str, str], Entry | None] = {}


def autotuned(direction: str, view: View, x: Tensor, name: str, key: str) -> Entry | None:
    """Tune for x, once per key and process whatever comes of it, and store what was found."""
    from .search import searched
    from .tuning import Size

    with _tuning:
        if (name, key) in _tried:
            return _tried[name, key]
        entry = _tried[name, key] = None
        try:
            size = Size(tuple(x.shape), x.stride(), x.dtype, x.device)
            entry = _tried[name, key] = searched(direction, size)
            tuning_table.save(name, {key: entry})
        except Exception as error:  # out of memory, no such folder, ...: the planner's plan serves
            what = "not stored" if entry else "not tuned"
            warnings.warn(f"TRITON_BRN_AUTOTUNE: {key} was {what}: {error}", stacklevel=2)
        return entry
