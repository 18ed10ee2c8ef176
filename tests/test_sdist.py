"""The source distribution holds what its own tests need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT = (".*", "build", "dist", "*.egg-info", "triton_brn_*", "__pycache__")


def test_tests_run_from_the_source_distribution(tmp_path: Path) -> None:
    source, dist = tmp_path / "source", tmp_path / "dist"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    dist.mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    with tarfile.open(*dist.glob("*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("triton_brn-*")
    shutil.rmtree(source)
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    needed = ("conftest.py", "reference.py")
    assert {f"tests/{name}" for name in needed} <= there
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "bench/compile_report.py"} <= there
    tests = ["tests/test_ramps.py", "tests/test_readme.py", "tests/test_planner.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=unpacked,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
