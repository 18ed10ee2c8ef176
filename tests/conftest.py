"""The device, chosen once; fixed seeds; the backends that the host-side rooms run on."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import torchvision_schemas

torchvision_schemas.declare()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu" and os.environ.get("TRITON_BRN_BACKEND") != "triton":
    # No GPU: Triton's interpreter runs the kernels. It is switched on before anything imports triton.
    # TRITON_BRN_BACKEND=triton means that a driver for CPU tensors was installed by a pytest plugin.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where every test runs."""
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def _no_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests run by the planner's plans, whatever was tuned on this machine."""
    os.environ["TRITON_BRN_CACHE_DIR"] = str(tmp_path_factory.mktemp("tables"))
    os.environ.pop("TRITON_BRN_AUTOTUNE", None)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a test's own tuning tables. None has been read yet, as in a new process."""
    from triton_brn import tuning_table

    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_BRN_CACHE_DIR", str(folder))
    monkeypatch.setattr(tuning_table, "_tables", {})
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on plain PyTorch and on the kernels."""
    monkeypatch.setenv("TRITON_BRN_BACKEND", request.param)
    return request.param


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on plain PyTorch: what it shows does not depend on the backend."""
    monkeypatch.setenv("TRITON_BRN_BACKEND", "eager")


def _round_bfloat16() -> None:
    """Triton's interpreter (3.6 to 3.9) truncates float32 to bfloat16; GPUs round. Let it round."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _round_bfloat16()
