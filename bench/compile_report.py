"""Compile the kernels for GPUs that need not be there, and report what the compilers made of them.

    python bench/compile_report.py [--targets sm_90,gfx942] [--dtypes bf16,fp32]

One row a launch of the plans for a list of shapes: registers, spills (local memory instructions in SASS,
spill counts in AMD assembly), shared memory, and the widest global access. Exits with 1 on a spill or where
an aligned tensor is not read 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_brn.kernels.backward import backward_kernel
from triton_brn.kernels.forward import forward_kernel
from triton_brn.kernels.inference import inference_kernel

from triton_brn.planner import Device, Plan, View, plan

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")
VIEWS = (
    View(32, 64, 3136),
    View(4, 64, 3136),
    View(32, 512, 784),
    View(32, 1024, 196),
    View(32, 2048, 49),
    View(4, 192, 1225),
    View(4, 32, 22201),
    View(512, 2048, 1),
    View(100_352, 64, 1),
    View(640, 17, 1),
)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
NUMBER = ("fp32", "fp32")
RAMP = (NUMBER,) * 4


@dataclass(frozen=True)
class Row:
    """What one compiled launch is like."""

    target: str
    kernel: str
    phases: str
    dtype: str
    view: View
    how: Plan
    registers: int
    spills: int
    shared: int
    widest: int  # bytes of the widest global load


def launches(view: View, dtype: str) -> Iterator[tuple[Any, Plan, dict[str, bool], dict[str, Any]]]:
    """Every kernel launch of training and inference: kernel, plan, phases, signature."""
    x, stat = f"*{dtype}", "*fp64" if dtype == "fp64" else "*fp32"
    sizes = {"outer": "i32", "channels": "i32", "inner": "i32"}
    device = Device("static", sms=132)
    how = plan("forward", view, ITEMSIZE[dtype], device)
    signature = {
        **{"x": x, "y": x, "affine": (stat, stat), "running": (stat, stat, "*i64"), "saved": stat},
        **{"workspace": (stat, "*i32"), **sizes, "settings": (NUMBER, NUMBER, RAMP, RAMP)},
    }
    both = [(True, True)] if how.strategy == "resident" else [(True, False), (False, True)]
    for statistics, apply in both:
        phases = {"STATISTICS": statistics, "APPLY": apply, "AVERAGE_STD": True}
        yield forward_kernel, how, phases, signature

    how = plan("backward", view, ITEMSIZE[dtype], device)
    signature = {
        **{"x": x, "dy": x, "dx": x, "affine": (stat, "constexpr"), "saved": stat, "grads": (stat, stat)},
        **{"workspace": (stat, "*i32"), **sizes},
    }
    both = [(True, True)] if how.strategy == "resident" else [(True, False), (False, True)]
    for sums, apply in both:
        yield backward_kernel, how, {"TRAINING": True, "SUMS": sums, "APPLY": apply}, signature

    how = plan("inference", view, ITEMSIZE[dtype], device)
    signature = {
        "x": x,
        "y": x,
        "affine": (stat, stat),
        "running": (stat, stat),
        "saved": stat,
        **sizes,
        "eps": NUMBER,
    }
    yield inference_kernel, how, {"SAVE": True}, signature


def compile_launch(
    target: str,
    kernel: Any,
    how: Plan,
    phases: dict[str, bool],
    signature: dict[str, Any],
    dtype: str,
    view: View,
) -> Row:
    """Compile as for tensors whose pointers are multiples of 16, as torch allocates them."""
    constants = {**phases, **how.tile}
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    constexprs: dict[Any, Any] = {(names.index(name),): value for name, value in constants.items()}
    attrs: dict[Any, Any] = {}
    for i, name in enumerate(names):
        for path, kind in leaves(signature[name], (i,)):
            if kind.startswith("*"):
                attrs[path] = [["tt.divisibility", 16]]
            elif kind == "constexpr" and len(path) > 1:
                constexprs[path] = None
    source = ASTSource(kernel, signature, constexprs, attrs)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": how.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=gpu, options=options)
    registers, spills, widest = (nvidia_facts if nvidia else amd_facts)(compiled.asm)
    shared = compiled.metadata.shared
    label = "+".join(name for name, on in phases.items() if on and name in ("STATISTICS", "SUMS", "APPLY"))
    return Row(target, kernel.__name__, label, dtype, view, how, registers, spills, shared, widest)


def leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The scalars of a nested signature, with their paths."""
    if isinstance(kind, tuple):
        for i, part in enumerate(kind):
            yield from leaves(part, (*path, i))
    else:
        yield path, kind


def nvidia_facts(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Registers, local memory instructions, bytes of the widest global load."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = run(tools / "cuobjdump", "-res-usage", file.name)
        sass = run(tools / "nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    bits = [
        int(b) * int(v or 1)
        for v, b in re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfu](\d+)", asm["ptx"])
    ]
    return registers, spills, max(bits, default=0) // 8


def amd_facts(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Vector registers, spilled registers, bytes of the widest global load."""
    text = asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    words = [int(n or 1) for n in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
    return registers, spills, max(words, default=0) * 4


def run(*command: Any) -> str:
    """Standard output of a command."""
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def narrow(row: Row) -> bool:
    """Whether an aligned tensor is read in less than its vectors, or 16 bytes."""
    return row.widest < row.how.vec * ITEMSIZE[row.dtype]


def main() -> int:
    """Print a row a launch; the exit status says whether all are as they should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default: %(default)s")
    parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated, default: %(default)s")
    args = parser.parse_args()
    bad = total = 0
    print(
        f"{'target':8}{'kernel':18}{'phases':18}{'dtype':6}{'(outer, C, inner)':20}{'strategy':12}"
        f"{'tile':>10}{'warps':>6}{'regs':>6}{'spills':>7}{'shared':>8}{'load B':>7}"
    )
    for target in args.targets.split(","):
        for dtype in args.dtypes.split(","):
            for view in VIEWS:
                for launch in launches(view, dtype):
                    row = compile_launch(target, *launch, dtype, view)
                    how, wrong = row.how, bool(row.spills or narrow(row))
                    bad, total = bad + wrong, total + 1
                    print(
                        f"{target:8}{row.kernel:18}{row.phases:18}{dtype:6}{tuple(view)!s:20}{how.strategy:12}"
                        f"{f'{how.block}x{how.width}':>10}{how.num_warps:6}{row.registers:6}{row.spills:7}"
                        f"{row.shared:8}{row.widest:7}{'  <--' if wrong else ''}"
                    )
    print(f"{total} launches compiled, {bad} with a spill or a narrow access")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
