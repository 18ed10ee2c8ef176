"""What the compilers made of a kernel, read from their output, and how much of it a multiprocessor holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from triton_brn.plans import SHARED_RESERVED


@dataclass(frozen=True)
class Facts:
    """What the compilers made of a launch."""

    registers: int
    spills: int
    loads: list[int]  # bytes of each global load in the code
    stores: list[int]  # and of each global store
    instructions: int  # in the code
    shared: int = 0
    seconds: float = 0.0


def nvidia_facts(asm: dict[str, Any]) -> Facts:
    """From the PTX and the SASS; a spill is an instruction on local memory."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = run(tools / "cuobjdump", "-res-usage", file.name)
        sass = run(tools / "nvdisasm", "-c", file.name)
    ptx = asm["ptx"]
    # Tiles of a loop that are on their way at a time are copied to shared memory, and loaded from there.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x[0-9a-f]+|\d+)", ptx)
    return Facts(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        loads=ptx_widths("ld", ptx) + [int(n, 0) for n in copies],
        stores=ptx_widths("st", ptx),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)),
    )


def ptx_widths(name: str, ptx: str) -> list[int]:
    """Bytes of each global load ("ld") or store ("st")."""
    found = re.findall(rf"\b{name}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return [int(bits) * int(vector or 1) // 8 for vector, bits in found]


def amd_facts(asm: dict[str, Any]) -> Facts:
    """From the assembly; a spill is a register's."""
    # Of scalar registers, some are kept in lanes of vector registers: no memory is touched, none is counted.
    text = asm["amdgcn"]
    return Facts(
        registers=int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1]),
        spills=sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)),
        loads=amd_widths("load", text),
        stores=amd_widths("store", text),
        instructions=len(re.findall(r"^\t[vsgb]\w+_\w+", text, re.M)),
    )


def amd_widths(name: str, text: str) -> list[int]:
    """Bytes of each global "load" or "store"."""
    found = re.findall(rf"\b(?:global|buffer)_{name}_(u?short|dword(?:x\d)?)", text)
    return [2 if "short" in kind else 4 * int(kind[6:] or 1) for kind in found]


def run(*command: Any) -> str:
    """Standard output of a command."""
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that share a multiprocessor share."""

    warps: int  # resident, at most
    programs: int  # resident, at most
    shared: int  # bytes of shared memory
    registers: int = 16_384  # of 32 bits, in each of four parts that have their own warps
    warp: int = 32  # threads
    reserved: int = SHARED_RESERVED  # bytes of shared memory a program, beside its own


def compute_unit(shared: int) -> Multiprocessor:
    """AMD's: four SIMDs of 512 vector registers a thread and eight waves each."""
    return Multiprocessor(32, 32, shared, registers=512 * 64, warp=64, reserved=0)


#: NVIDIA's by "Technical Specifications per Compute Capability" in the CUDA programming guide.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
    "gfx90a": compute_unit(64 << 10),
    "gfx942": compute_unit(64 << 10),
    "gfx950": compute_unit(160 << 10),
}


def programs_at_once(target: str, warps: int, facts: Facts) -> int:
    """Programs that share a multiprocessor."""
    sm = MULTIPROCESSORS[target]
    registers = sm.warp * -(max(1, facts.registers) // -8) * 8  # they are handed out by eight a thread
    resident = min(sm.warps, 4 * (sm.registers // registers))
    shared = facts.shared + sm.reserved
    return min(sm.programs, resident // warps, sm.shared // shared if shared else sm.programs)
