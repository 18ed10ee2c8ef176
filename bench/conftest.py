"""What is printed in the end: the tables of ``python -m triton_brn bench``, and whether targets hold."""

from __future__ import annotations

import pytest
import torch

from triton_brn._bench_measure import stamp
from triton_brn._bench_report import print_tables
from triton_brn._bench_run import Row

ROWS: list[Row] = []
LINES: list[str] = []


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """What the tables are made of."""
    return ROWS


@pytest.fixture(scope="session")
def table() -> list[str]:
    """Lines that are printed below them."""
    return LINES


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table is of rounds, in which each contestant has its turn


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("CPU")
        print_tables(ROWS)
    if LINES:
        terminalreporter.section("Targets")
        for line in LINES:
            terminalreporter.write_line(line)
        stamps = stamp(torch.device("cpu"))
        terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in stamps.items()))
