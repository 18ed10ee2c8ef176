"""The report of what the compilers made of the kernels: it must see bad code. No GPU is needed.

Where the session's kernels run in Triton's interpreter, nothing can be compiled in its process: the tests
that compile are then run in another, by the first.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="nothing compiles without Triton")
import triton.language as tl  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import compile_report  # noqa: E402
from compile_facts import Facts, amd_facts, nvidia_facts, programs_at_once  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from triton_brn.views import View  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiling = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter is on: compiled by test_in_another_process"
)
TARGETS = ("sm_90", "gfx942")
VIEW = View(32, 64, 3136)


@pytest.mark.skipif(not INTERPRETED, reason="the tests that compile do so in this process")
def test_in_another_process() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        cwd=Path(__file__).parents[1],
        env={**environment, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 1 skipped" in done.stdout, done.stdout  # this one: the others did compile


@triton.jit
def copy_kernel(x, y, N: tl.constexpr):
    """y = x for N elements, all of them loaded before one is stored."""
    i = tl.arange(0, N)
    t = tl.load(x + i)
    tl.store(y + i, t * tl.sum(t, 0))


@triton.jit
def scalar_kernel(x, y, N: tl.constexpr):
    """One element."""
    tl.store(y, tl.load(x) + N)


def facts_of(target: str, kernel: Any, n: int, **options: Any) -> Facts:
    """What the compilers make of a kernel of this file, on aligned float32 tensors."""
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    signature = {"x": "*fp32", "y": "*fp32", "N": "constexpr"}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    source = ASTSource(kernel, signature, {(2,): n}, aligned)
    return (nvidia_facts if nvidia else amd_facts)(
        triton.compile(source, gpu, {"enable_fp_fusion": True, **options}).asm
    )


@compiling
@pytest.mark.parametrize(
    ("target", "n", "options"),
    [("sm_90", 4096, {"maxnreg": 32}), ("gfx942", 8192, {"waves_per_eu": 8})],
    ids=TARGETS,
)
def test_spills_are_counted(target: str, n: int, options: dict[str, Any]) -> None:
    """A thread keeps 128 elements, and has 32 or 64 registers; then it keeps four."""
    assert facts_of(target, copy_kernel, n, num_warps=1, **options).spills > 0
    assert facts_of(target, copy_kernel, n // 32, num_warps=1, **options).spills == 0


@compiling
@pytest.mark.parametrize("target", TARGETS)
def test_widths_of_accesses(target: str) -> None:
    wide = facts_of(target, copy_kernel, 2048, num_warps=1)
    assert set(wide.loads) == set(wide.stores) == {16}
    assert len(wide.loads) == len(wide.stores) == 2048 // (32 if target == "sm_90" else 64) // 4
    narrow = facts_of(target, scalar_kernel, 1, num_warps=1)
    assert narrow.stores == [4]
    assert max(narrow.loads, default=0) <= 4  # AMD's compiler may load a scalar through the scalar cache


def launches(target: str) -> Iterator[compile_report.Launch]:
    """The report's, of one view."""
    return compile_report.launches(VIEW, "bf16", compile_report.device(target))


@compiling
@pytest.mark.parametrize("target", TARGETS)
def test_a_narrow_access_is_wrong(target: str) -> None:
    launch = next(n for n in launches(target) if n.kernel.__name__ == "batch_renorm_inference_kernel")
    row = compile_report.row_of(target, "bf16", VIEW, launch)
    assert (row.wrong, row.load, row.store) == ("", 16, 16)
    for name, width in (("x", "load"), ("y", "store")):  # one side at a time
        unaligned = dataclasses.replace(launch, unaligned=(name,))
        row = compile_report.row_of(target, "bf16", VIEW, unaligned)
        assert row.wrong == "narrow"
        assert getattr(row, width) < 16


GOOD = Facts(registers=32, spills=0, loads=[16] * 99, stores=[16] * 99, instructions=99)


def verdict(monkeypatch: pytest.MonkeyPatch, launch: compile_report.Launch, **facts: Any) -> str:
    """What the report has against a launch that was compiled to something good, but for ``facts``."""
    monkeypatch.setattr(compile_report, "compiled", lambda *_: dataclasses.replace(GOOD, **facts))
    return compile_report.row_of("sm_90", "bf16", VIEW, launch).wrong


def test_each_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = next(n for n in launches("sm_90") if n.plan.waits)
    tried = dataclasses.replace(waiting, candidate=True)
    assert verdict(monkeypatch, waiting) == ""
    assert verdict(monkeypatch, waiting, spills=1) == "spills"
    assert verdict(monkeypatch, tried, spills=1) == ""
    assert verdict(monkeypatch, waiting, loads=[8] * 99) == "narrow"
    assert verdict(monkeypatch, waiting, stores=[8] * 99) == "narrow"
    assert verdict(monkeypatch, waiting, shared=200_000) == "does not fit"
    assert verdict(monkeypatch, tried, shared=200_000) == "does not fit"


def test_statistics_alone_store_nothing_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = next(n for n in launches("sm_90") if not n.writes)
    assert verdict(monkeypatch, alone, stores=[4] * 9) == ""


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 4, 255, 0, 2),  # registers
        ("sm_90", 4, 128, 0, 4),
        ("sm_90", 4, 16, 0, 16),  # 2,048 threads
        ("sm_89", 4, 16, 0, 12),  # 1,536 threads
        ("sm_90", 1, 16, 0, 32),  # programs
        ("sm_86", 1, 16, 0, 16),
        ("sm_90", 4, 16, 56 << 10, 4),  # 228 KiB in programs of 57
        ("sm_86", 4, 16, 56 << 10, 1),
        ("gfx942", 4, 128, 0, 4),
        ("gfx942", 4, 16, 0, 8),  # eight waves of each SIMD
        ("gfx942", 4, 16, 32 << 10, 2),
        ("gfx950", 4, 16, 32 << 10, 5),
    ],
)
def test_programs_that_share_a_multiprocessor(
    target: str, warps: int, registers: int, shared: int, programs: int
) -> None:
    facts = Facts(registers, 0, [], [], 0, shared)
    assert programs_at_once(target, warps, facts) == programs


@pytest.mark.parametrize("wrong", ["", "spills"])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    monkeypatch.setattr(compile_report, "compiled", lambda *_: GOOD)
    row = compile_report.row_of("sm_90", "bf16", VIEW, next(launches("sm_90")))
    rows = [row, dataclasses.replace(row, wrong=wrong)]
    monkeypatch.setattr(compile_report, "reports", lambda *_: [rows])
    assert compile_report.main([]) == (1 if wrong else 0)
    assert f"2 launches compiled, {int(bool(wrong))} with" in capsys.readouterr().out
