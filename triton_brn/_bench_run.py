"""One input after another: makes the contestants, times them, and hands back rows."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._bench_budget import Budget, Compiling
from ._bench_cases import Case
from ._bench_measure import (
    Call,
    ColdEvents,
    Effort,
    Times,
    block_of,
    captured,
    copy_bandwidth,
    keep_freed_memory,
    launches,
    peak_memory,
    quantile,
    ratio,
    rounds,
    stamp,
    wall_clock,
)
from ._bench_peers import OURS, Peer, backward_can_be_repeated, call_of, peers
from ._bench_plans import joined, plans_of


@dataclass(frozen=True)
class Row:
    """One contestant on one direction of one input. None: does not apply here, or see ``note``."""

    shape: str
    dtype: str
    layout: str
    direction: str
    peer: str
    strategy: str  # of our plan for this input; "eager": torch's own kernels
    planned_by: str = ""  # that plan: "planner", "tuned" or "retreat", see _bench_plans
    package: str = ""  # and version, of a contestant that is neither torch's nor ours
    ms: float | None = None  # median; CUDA: device events, L2 cold; CPU: wall clock
    ms_q20: float | None = None
    ms_q80: float | None = None
    graph_ms: float | None = None  # CUDA: replay of a CUDA graph, L2 cold
    graph_ms_q20: float | None = None
    graph_ms_q80: float | None = None
    wall_ms: float | None = None  # CUDA: wall clock per call, back to back: above graph_ms, the host binds
    gbps: float | None = None  # ideal bytes (each tensor once) / ms
    copy_percent: float | None = None  # gbps of copy_gbps
    graph_gbps: float | None = None
    graph_copy_percent: float | None = None
    copy_gbps: float | None = None  # measured: a large tensor's copy, read and write counted
    speedup: float | None = None  # of triton_brn over this contestant: median over rounds
    graph_speedup: float | None = None
    peak_mib: float | None = None  # CUDA: held by a call at most, beyond its inputs
    launches: int | None = None  # CUDA: kernels, fills and copies
    ideal_mb: float | None = None  # 1e6 bytes
    unsteady: str = ""  # why the times are not to be trusted: a wide spread, a busy machine
    note: str = ""
    device: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    triton_brn: str = ""

    @property
    def best_gbps(self) -> float | None:
        """Of a graph's replay where there is one."""
        return self.graph_gbps or self.gbps

    @property
    def best_ms(self) -> float | None:
        """Of a graph's replay where there is one."""
        return self.graph_ms or self.ms


@dataclass
class Measured:
    """What one direction of one input took, by contestant."""

    times: Times = field(default_factory=dict)
    graph: Times = field(default_factory=dict)
    wall: Times = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    busy: str = ""  # what else the machine did


def contestants(
    case: Case, tensors: tuple[Tensor, Tensor], directions: Sequence[str], compiling: Compiling
) -> tuple[dict[str, tuple[Peer, nn.Module]], dict[str, str]]:
    """The layers that run this input, each having run all directions, and why others do not."""
    x, dy = tensors
    found: dict[str, tuple[Peer, nn.Module]] = {}
    notes: dict[str, str] = {}
    for peer in peers(x.device.type):
        why_not = peer.missing or (compiling.refusal if peer.compiled else "")
        if not why_not:
            try:
                layer = peer.make(case.shape, x.device, x.dtype)
                with compiling.counted() if peer.compiled else nullcontext():
                    for direction in directions:
                        call_of(layer, x, dy, direction)()
                found[peer.name] = (peer, layer)
            except Exception as error:  # whatever a contestant cannot do is its result
                why_not = short(error)
        if why_not:
            notes[peer.name] = why_not
    return found, notes


def short(error: Exception) -> str:
    """The error's type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def measure(
    case: Case, directions: Sequence[str], device: torch.device, budget: Budget, bar: Any
) -> Iterator[list[Row]]:
    """All contestants on one input: the rows of each direction when it is measured."""
    x, dy = tensors = case.tensors(device)
    measure_how, timers = (measure_cuda, 3) if device.type == "cuda" else (measure_cpu, 1)
    if budget.compiling.seconds:
        torch._dynamo.reset()  # what was compiled for another input only lengthens its search
    with backward_can_be_repeated():
        bar.set_postfix_str(f"{case}: contestants")
        layers, notes = contestants(case, tensors, directions, budget.compiling)
        for direction in directions:
            bar.set_postfix_str(f"{case}: {direction}")
            busy = busy_machine() if device.type == "cpu" else ""
            measured = measure_how(layers, x, dy, direction, budget.next_effort(timers))
            measured.notes = {**notes, **measured.notes}
            measured.busy = busy
            yield stamped_rows(case, x, direction, layers, measured)
            bar.update()


Layers = dict[str, tuple[Peer, nn.Module]]


def ready(layers: Layers, x: Tensor, dy: Tensor, direction: str) -> tuple[dict[str, Call], dict[str, str]]:
    """One call of each that has run, and why others have not: together they hold more memory than alone."""
    calls: dict[str, Call] = {}
    notes: dict[str, str] = {}
    for name, (_, layer) in layers.items():
        try:
            call = call_of(layer, x, dy, direction)
            call()
            calls[name] = call
        except Exception as error:
            notes[name] = short(error)
    return calls, notes


def measure_cpu(layers: Layers, x: Tensor, dy: Tensor, direction: str, effort: Effort) -> Measured:
    """Wall clock, in blocks of calls."""
    keep_freed_memory()
    calls, notes = ready(layers, x, dy, direction)
    return Measured(times=rounds(calls, wall_clock(block_of(calls)), effort), notes=notes)


def measure_cuda(layers: Layers, x: Tensor, dy: Tensor, direction: str, effort: Effort) -> Measured:
    """Device events and graph replays with a cold L2; wall clock of calls back to back; memory; launches."""
    calls, notes = ready(layers, x, dy, direction)
    replays: dict[str, Call] = {}
    for name in calls:
        peer, layer = layers[name]
        if peer.waits_for_host:
            notes[name] = "no CUDA graph: it waits for the device"
            continue
        try:
            replays[name] = captured(functools.partial(call_of, layer, x, dy, direction))
        except Exception as error:
            notes[name] = f"no CUDA graph: {short(error)}"
    events, wait = ColdEvents(x.device), torch.cuda.synchronize
    blocks = replace(effort, most=effort.most // 4)  # of calls
    return Measured(
        times=rounds(calls, events, effort),
        graph=rounds(replays, events, effort),
        wall=rounds(calls, wall_clock(block_of(calls, wait), wait), blocks),
        peak={name: peak_memory(call) for name, call in calls.items()},
        launches={name: count for name, call in calls.items() if (count := launches(call))},
        notes=notes,
    )


#: From the 20 % to the 80 % quantile, over the median: with more, a ratio of two contestants says little.
WIDE_SPREAD = 0.25


def wide_spread(seconds: list[float] | None) -> str:
    """The times' spread, if it is wide."""
    if not seconds:
        return ""
    spread = (quantile(seconds, 0.8) - quantile(seconds, 0.2)) / statistics.median(seconds)
    return f"spread {spread:.0%}" if spread > WIDE_SPREAD else ""


def busy_machine() -> str:
    """The load of the last minute, if others had a share in it."""
    if not hasattr(os, "getloadavg"):  # Windows
        return ""
    load = os.getloadavg()[0]
    return f"busy machine: load {load:.1f}" if load > torch.get_num_threads() + 0.5 else ""


def stamped_rows(case: Case, x: Tensor, direction: str, layers: Layers, measured: Measured) -> list[Row]:
    """Rows that say what ran, and where."""
    measured.packages = {name: peer.version for name, (peer, _) in layers.items()}
    plans = plans_of(x, direction)
    return rows_of(case, direction, plans, measured, copy_bandwidth(x.device), stamp(x.device))


def rows_of(
    case: Case,
    direction: str,
    plans: list[tuple[str, str]],
    measured: Measured,
    copy_gbps: float,
    stamps: dict[str, str],
) -> list[Row]:
    """A row for each contestant, those that did not run too."""
    ideal = case.ideal_bytes(direction)
    rows = []
    for name in [*measured.times, *(n for n in measured.notes if n not in measured.times)]:
        values: dict[str, Any] = {**stamps}
        for prefix, times in (("", measured.times), ("graph_", measured.graph)):
            if name not in times:
                continue
            seconds = times[name]
            median = statistics.median(seconds)
            values[f"{prefix}ms"] = median * 1e3
            values[f"{prefix}ms_q20"] = quantile(seconds, 0.2) * 1e3
            values[f"{prefix}ms_q80"] = quantile(seconds, 0.8) * 1e3
            values[f"{prefix}gbps"] = ideal / median / 1e9
            values[f"{prefix}copy_percent"] = 100 * ideal / median / 1e9 / copy_gbps
            if OURS in times:
                values[f"{prefix}speedup"] = ratio(times, name, OURS)
        values["unsteady"] = "; ".join(
            filter(None, (wide_spread(measured.graph.get(name) or measured.times.get(name)), measured.busy))
        )
        if name in measured.wall:
            values["wall_ms"] = statistics.median(measured.wall[name]) * 1e3
        rows.append(
            Row(
                shape=case.size,
                dtype=case.dtype,
                layout=case.layout,
                direction=direction,
                peer=name,
                strategy=joined(strategy for strategy, _ in plans),
                planned_by=joined(who for _, who in plans),
                package=measured.packages.get(name, ""),
                copy_gbps=copy_gbps,
                ideal_mb=ideal / 1e6,
                peak_mib=measured.peak.get(name),
                launches=measured.launches.get(name),
                note=measured.notes.get(name, ""),
                **values,
            )
        )
    return rows
