"""The house: what imports what, and what importing does."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triton_brn
import triton_brn.version

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
HOST = sorted((ROOT / "triton_brn").glob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules a file imports, anywhere in it; relative ones begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_device_code_imports_triton_and_itself(path: Path) -> None:
    modules = {path.stem for path in KERNELS}
    for name in imports(path) - {"__future__"}:
        assert name.split(".")[0] == "triton" or name.removeprefix(".") in modules, f"{path.name}: {name}"


def test_only_the_launch_room_reaches_device_code() -> None:
    assert len(KERNELS) > 1
    assert {p.name for p in HOST if any("kernels" in name for name in imports(p))} == {"launch.py"}


def test_importing_touches_nothing() -> None:
    """No triton, no device, no torch submodule that takes long: `import triton_brn` works on any machine."""
    script = """
import torch, sys
def no_device(*args, **kwargs):
    raise AssertionError("a device was asked for")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = no_device
before = set(sys.modules)
import triton_brn
triton_brn.BatchRenorm2d(3)
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "numpy", "matplotlib", "mlxtend", "tqdm"}, new
assert "torch._dynamo" not in set(sys.modules) - before
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "fine\n", done.stderr


def test_public_names() -> None:
    assert sorted(triton_brn.__all__) == [
        "BatchRenorm1d",
        "BatchRenorm2d",
        "BatchRenorm3d",
        "BatchRenormAct2d",
        "Limit",
        "Ramp",
        "__version__",
        "batch_renorm",
        "convert_batchnorm",
        "convert_batchrenorm",
        "forced_strategy",
        "revert_to_batchnorm",
        "tune",
    ]
    for name in triton_brn.__all__:
        assert hasattr(triton_brn, name)
        assert getattr(triton_brn, name).__doc__


def test_metadata() -> None:
    assert (
        importlib.metadata.version("triton_brn") == triton_brn.__version__ == triton_brn.version.__version__
    )
    requires = [r for r in importlib.metadata.requires("triton_brn") or [] if "extra ==" not in r]
    names = sorted(r.split(">")[0].split(";")[0].strip() for r in requires)
    assert names == ["filelock", "platformdirs", "torch", "triton", "triton-windows"], (
        "nothing else is needed to run"
    )


def test_types_are_shipped() -> None:
    assert (ROOT / "triton_brn" / "py.typed").is_file()


def test_what_extras_ask_for_is_pinned() -> None:
    """`make` installs the same versions everywhere. triton is left to torch, see constraints.txt."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in asked} - {"triton", "triton-windows"}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"
    assert {"demo", "examples", "test", "zoo"} <= project["optional-dependencies"].keys()
