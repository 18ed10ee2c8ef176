"""The table at the end of a run: what pytest-benchmark's own cannot say, ratios between the layers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

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
    return f"{cpu_model()}, {torch.get_num_threads()} threads; {', '.join(versions)}"


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark

        return str(get_cpu_info().get("brand_raw") or platform.machine())
    except ImportError:
        return platform.processor() or platform.machine()
