"""Compile the kernels for GPUs that need not be there, and report what the compilers made of them.

    python bench/compile_report.py [--targets sm_90,gfx942] [--dtypes bf16,fp32] [--candidates] [--out FILE]

One row a launch, for every strategy that the planner has for each of a list of shapes: registers, spills
(local memory instructions in SASS, spill counts in AMD assembly), shared memory, programs that share a
multiprocessor, the widest global load and store, instructions per element, seconds. Exits with 1 on a
spill, where an aligned tensor is not read and written 16 bytes at a time, or where fewer programs that wait
would run at the same time than the plan counts on. --candidates adds the neighbours of each plan, which
tuning tries: for those a spill is no failure, since tuning refuses it, nor is a narrow access, which tuning
times.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from compile_facts import MULTIPROCESSORS, Facts, amd_facts, nvidia_facts, programs_at_once
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_brn.kernels.backward import batch_renorm_backward_kernel
from triton_brn.kernels.forward import batch_renorm_forward_kernel
from triton_brn.kernels.inference import batch_renorm_inference_kernel

from triton_brn import candidates
from triton_brn.plans import Device, Plan
from triton_brn.validate import NAMED_DTYPES
from triton_brn.views import View

TARGETS = tuple(MULTIPROCESSORS)
#: Every shape of tile, every strategy, every size of tile that the planner's limits allow.
VIEWS = (
    View(32, 64, 3136),  # aligned
    View(4, 64, 3136),
    View(32, 512, 784),
    View(2, 32, 262_144),
    View(64, 32, 2_097_152),
    View(32, 1024, 196),  # folded, in float32 a window without edges
    View(256, 1024, 196),
    View(32, 2048, 49),
    View(256, 512, 56),
    View(512, 2048, 49),
    View(4, 192, 1225),  # window
    View(4, 32, 22_201),
    View(64, 32, 22_201),
    View(256, 64, 1225),
    View(60, 33, 1225),
    View(8, 192, 289),
    View(512, 64, 169),
    View(300, 3, 15),  # too few channels to fold, too small for edges
    View(32, 160, 289),  # clusters of many programs, of two warps each
    View(32, 48, 1225),
    View(512, 2048, 1),  # rows
    View(512, 256, 1),
    View(32, 64, 1),
    View(100_352, 64, 1),
    View(2_000_000, 64, 1),
    View(640, 17, 1),
    View(9_248, 128, 1),  # on sm_100 full tiles of two warps
    View(1_156, 128, 1),
)
NUMBER = ("fp32", "fp32")
RAMP = (NUMBER,) * 4
SIZES = {"outer": "i32", "channels": "i32", "inner": "i32"}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Launch:
    """A launch to compile."""

    kernel: Any
    plan: Plan
    flags: dict[str, bool]
    signature: dict[str, Any]
    candidate: bool  # of tuning; else the planner's
    unaligned: tuple[str, ...] = ()  # arguments whose pointers are no multiples of 16

    @property
    def reads(self) -> int:
        """How often each element of a tile is loaded in the code."""
        if self.flags.get("KEEP"):
            return 1
        first = 2 if self.flags.get("STATISTICS") else 0  # the pivot's tile, and the others'
        return first + self.flags.get("SUMS", False) + self.writes

    @property
    def edge_reads(self) -> int:
        """How often each element of the edges is loaded."""
        return 1 if self.flags.get("KEEP") else min(self.reads, self.writes + 1)

    @property
    def writes(self) -> int:
        """How often it is stored."""
        return int(self.flags.get("APPLY", True))


@dataclass(frozen=True)
class Row:
    """What one compiled launch is like."""

    target: str
    dtype: str
    view: str
    kernel: str
    phases: str
    strategy: str
    by: str
    tile: str
    warps: int
    registers: int
    spills: int
    shared: int  # bytes
    programs: int  # that share a multiprocessor
    load: int  # bytes of the widest global load
    store: int  # and of the widest global store
    instructions: float  # in the code, per element of a thread's part of the tile
    seconds: float
    wrong: str


def device(target: str) -> Device:
    """A device of this kind, of the size of a large one."""
    nvidia = target.startswith("sm_")
    capability = int(target[3:]) if nvidia else 0
    sm = MULTIPROCESSORS[target]
    return Device(target, 132, capability, TRITON, shared=sm.shared - sm.reserved, warp=sm.warp, l2=50 << 20)


def launches(view: View, dtype: str, gpu: Device, tuning: bool = False) -> Iterator[Launch]:
    """Every launch of every plan for training and inference; with ``tuning``, of their neighbours too."""
    x, stat = f"*{dtype}", "*fp64" if dtype == "fp64" else "*fp32"
    signatures: dict[str, dict[str, Any]] = {
        "forward": {
            **{"x": x, "y": x, "affine": (stat, stat), "running": (stat, stat, "*i64"), "saved": stat},
            **{"settings": (NUMBER, NUMBER, RAMP, RAMP)},
        },
        "backward": {"x": x, "dy": x, "dx": x, "weight": stat, "saved": stat, "grads": (stat, stat)},
    }
    names = {"forward": "STATISTICS", "backward": "SUMS"}
    kernels = {"forward": batch_renorm_forward_kernel, "backward": batch_renorm_backward_kernel}
    call = (view, NAMED_DTYPES[dtype].itemsize, gpu)
    for direction, kernel in kernels.items():
        for how, candidate in plans(direction, *call, tuning):
            exchange = stat if how.split else "constexpr"
            workspace = (exchange, exchange, "*i32")
            signature = {**signatures[direction], "workspace": workspace, **SIZES}
            kind = {"AVERAGE_STD": True} if direction == "forward" else {"TRAINING": True}
            split = how.strategy == "two_launch"
            for sums, apply in ((True, False), (False, True)) if split else ((True, True),):
                flags = {names[direction]: sums, "APPLY": apply, "KEEP": how.kept, "SPLIT": how.split}
                yield Launch(kernel, how, {**kind, **flags}, signature, candidate)
    pair, none = (stat, stat), ("constexpr", "constexpr")
    signature = {"x": x, "y": x, "affine": pair, "saved": stat, **SIZES, "eps": NUMBER}
    for how, candidate in plans("inference", *call, tuning):
        for running in (pair, none):  # none: a training forward again, from what it saved
            flags = {"SAVE": running is pair}
            yield Launch(
                batch_renorm_inference_kernel, how, flags, {**signature, "running": running}, candidate
            )


def plans(
    direction: str, view: View, itemsize: int, gpu: Device, tuning: bool
) -> Iterator[tuple[Plan, bool]]:
    """Every strategy's plan, where it has one; with ``tuning``, then their neighbours, marked True."""
    found = candidates.strategies(direction, view, itemsize, gpu)
    yield from ((plan, False) for plan in found)
    if tuning:
        near = (candidates.neighbours(plan, direction, view, itemsize, gpu) for plan in found)
        yield from ((plan, True) for plan in dict.fromkeys(itertools.chain(*near)) if plan not in found)


def row_of(target: str, dtype: str, view: View, launch: Launch) -> Row:
    """Compile a launch, and say what is wrong with it."""
    how, gpu = launch.plan, device(target)
    facts = compiled(target, launch)
    programs = programs_at_once(target, how.num_warps, facts)
    threads = how.num_ctas * how.num_warps * gpu.warp
    per_thread = how.tile.elements / threads
    wrong = []
    if not launch.candidate:
        if facts.spills:
            wrong.append("spills")
        if narrow(launch, facts, threads, NAMED_DTYPES[dtype].itemsize):
            wrong.append("narrow")
    # What runs at the same time, and what a call would count on when it has compiled.
    at_once = min(programs * gpu.sms, gpu.co_resident(how.num_warps, facts.registers, facts.shared))
    if how.waits and gpu.capability and how.slots * how.splits > at_once:
        wrong.append("does not fit")
    return Row(
        target,
        dtype,
        f"{view.outer},{view.channels},{view.inner}",
        launch.kernel.__name__.removeprefix("batch_renorm_").removesuffix("_kernel"),
        "+".join(n for n in ("STATISTICS", "SUMS", "APPLY", "SAVE") if launch.flags.get(n)),
        how.strategy,
        "tuning" if launch.candidate else "plan",
        tile_of(how),
        how.num_warps,
        facts.registers,
        facts.spills,
        facts.shared,
        programs,
        max(facts.loads, default=0),
        max(facts.stores, default=0),
        round(facts.instructions / per_thread, 1),
        round(facts.seconds, 2),
        ", ".join(wrong),
    )


def narrow(launch: Launch, facts: Facts, threads: int, itemsize: int) -> bool:
    """Whether fewer accesses are as wide as the tile's vectors than a thread's part of the tile takes."""
    tile, tensors = launch.plan.tile, 2 if launch.flags.get("TRAINING") else 1
    accesses = tile.elements / threads / tile.vec
    loads, stores = (sum(n >= tile.vec * itemsize for n in w) for w in (facts.loads, facts.stores))
    if loads < tensors * launch.reads * accesses or stores < launch.writes * accesses:
        return True
    # Edges are loaded by vectors too, shorter ones where a thread has fewer; stored by single elements.
    edges = tile.segments * 2 * tile.lead / threads
    vec = max(1, min(tile.vec, edges))
    loads = sum(n >= vec * itemsize for n in facts.loads)
    return loads < tensors * (launch.reads * accesses + launch.edge_reads * int(edges / vec))


def tile_of(how: Plan) -> str:
    """A plan's tile, the programs of a cluster that share it, the tiles that are on their way at a time."""
    shared = f" /{how.num_ctas}" if how.num_ctas > 1 else ""
    staged = f" *{how.tile.stages}" if how.tile.stages > 1 else ""
    return f"{how.tile.block}x{how.tile.width}{shared}{staged}"


_compiled: dict[str, Facts] = {}


def compiled(target: str, launch: Launch) -> Facts:
    """Compile as for tensors whose pointers are multiples of 16, as torch allocates them. Once: many
    launches differ in their grids alone."""
    how, names, nvidia = launch.plan, launch.kernel.arg_names, target.startswith("sm_")
    options = how.options(device(target))
    what = (launch.kernel.__name__, launch.flags, launch.signature, launch.unaligned)
    key = repr((target, *what, how.tile, options))
    if key in _compiled:
        return _compiled[key]
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    constexprs: dict[Any, Any] = {(names.index(n),): v for n, v in {**launch.flags, "T": how.tile}.items()}
    attrs: dict[Any, Any] = {}
    for i, name in enumerate(names):
        for path, kind in leaves(signature[name], (i,)):
            if kind.startswith("*") and name not in launch.unaligned:
                attrs[path] = [["tt.divisibility", 16]]
            elif kind == "constexpr" and len(path) > 1:
                constexprs[path] = None
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    start = time.perf_counter()
    binary = triton.compile(ASTSource(launch.kernel, signature, constexprs, attrs), gpu, options)
    seconds = time.perf_counter() - start
    facts = (nvidia_facts if nvidia else amd_facts)(binary.asm)
    _compiled[key] = dataclasses.replace(facts, shared=binary.metadata.shared, seconds=seconds)
    return _compiled[key]


def leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The scalars of a nested signature, with their paths."""
    if isinstance(kind, tuple):
        for i, part in enumerate(kind):
            yield from leaves(part, (*path, i))
    else:
        yield path, kind


def report(target: str, dtype: str, tuning: bool) -> list[Row]:
    """Compile everything for one target and dtype."""
    every = ((view, launches(view, dtype, device(target), tuning)) for view in VIEWS)
    return [row_of(target, dtype, view, launch) for view, some in every for launch in some]


def reports(targets: list[str], dtypes: list[str], tuning: bool) -> Iterator[list[Row]]:
    """The reports of all targets and dtypes, several at a time."""
    pairs = [*zip(*itertools.product(targets, dtypes, [tuning]), strict=True)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(report, *pairs)


def main(arguments: list[str] | None = None) -> int:
    """Print a row a launch; the exit status says whether all are as they should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default: %(default)s")
    parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated, default: %(default)s")
    parser.add_argument("--candidates", action="store_true", help="also what tuning would try")
    parser.add_argument("--out", help="a CSV file of the rows")
    args = parser.parse_args(arguments)
    line = "{:8}{:6}{:18}{:11}{:17}{:13}{:8}{:>14}{:>6}{:>10}{:>7}{:>7}{:>9}{:>5}{:>6}{:>13}{:>8}  {}".format
    fields = [field.name for field in dataclasses.fields(Row)]
    print(line(*fields), flush=True)
    rows = []
    for part in reports(args.targets.split(","), args.dtypes.split(","), args.candidates):
        for row in part:
            rows.append(dataclasses.astuple(row))
            print(line(*rows[-1]), flush=True)
    if args.out:
        with open(args.out, "w", newline="") as file:
            csv.writer(file).writerows([fields, *rows])
    bad = sum(bool(row[-1]) for row in rows)
    print(f"{len(rows)} launches compiled, {bad} with a spill, a narrow access or too few programs")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
