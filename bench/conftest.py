"""The table at the end of a run: what pytest-benchmark's own cannot say, ratios between the layers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from triton_brn._bench_measure import cpu_model

ROWS: list[str] = []


@pytest.fixture(scope="session")
def table() -> list[str]:
    """Lines that are printed when all benchmarks have run."""
    return ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("CPU: training step, forward + backward")
    for line in (*ROWS, "", machine()):
        terminalreporter.write_line(line)


def machine() -> str:
    """What the numbers belong to."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "torchrl"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{cpu_model()}, threads: {torch.get_num_threads()}; {', '.join(versions)}"
