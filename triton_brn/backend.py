"""Which code serves a tensor: the Triton kernels, or plain PyTorch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("auto", "triton", "eager")


def uses_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve tensors on ``device``, by TRITON_BRN_BACKEND.

    ``auto`` (the default) takes Triton where its active driver serves the device or its
    interpreter is on, else plain PyTorch.

    Raises:
        ValueError: TRITON_BRN_BACKEND has an unknown value.
        RuntimeError: TRITON_BRN_BACKEND=triton where Triton cannot run.
    """
    choice = os.environ.get("TRITON_BRN_BACKEND", "auto")
    if choice == "eager":
        return False
    if choice not in BACKENDS:
        raise ValueError(f"TRITON_BRN_BACKEND: expected one of {', '.join(BACKENDS)}, got {choice!r}")
    why_not = obstacle(device.type)
    if why_not and choice == "triton":
        raise RuntimeError(f"TRITON_BRN_BACKEND=triton cannot serve a tensor on {device}: {why_not}")
    return not why_not


@functools.cache
def obstacle(device_type: str) -> str:
    """Why Triton cannot serve this device type; empty where it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return ""
    if device_type == "meta":
        return "a meta tensor has no data"
    try:
        served = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError as error:  # no driver: the message names the reason
        return f"Triton has no driver here ({error})"
    return "" if served == device_type else f"Triton's driver serves {served}"


_may_autotune = ContextVar("_may_autotune", default=True)


def autotunes() -> bool:
    """Whether TRITON_BRN_AUTOTUNE asks to tune what comes first.

    Raises:
        ValueError: it is neither 1 nor 0.
    """
    choice = os.environ.get("TRITON_BRN_AUTOTUNE", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"TRITON_BRN_AUTOTUNE: expected 1 or 0, got {choice!r}")
    return choice == "1" and _may_autotune.get()


@contextmanager
def without_autotuning() -> Iterator[None]:
    """In this thread TRITON_BRN_AUTOTUNE does nothing inside the ``with`` block."""
    token = _may_autotune.set(False)
    try:
        yield
    finally:
        _may_autotune.reset(token)
