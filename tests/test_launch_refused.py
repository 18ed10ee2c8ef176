"""Launches that a driver refuses, where the compiler's numbers promised that they fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triton_brn.views import View

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

VIEW = View(2, 3, 4)


@pytest.mark.parametrize(
    ("strategy", "message", "retreats"),
    [
        ("cooperative", "Triton Error [CUDA]: too many blocks in cooperative launch", True),
        ("blocked", "Triton Error [HIP]: too many blocks in cooperative launch", True),
        ("cooperative", "Triton Error [CUDA]: out of memory", False),
        ("two_launch", "Triton Error [CUDA]: too many blocks in cooperative launch", False),
    ],
)
def test_a_driver_that_refuses(strategy: str, message: str, retreats: bool, device, monkeypatch) -> None:
    """As in a green context. Nothing has run, so another plan may; other errors reach the caller."""
    x = torch.empty(VIEW, device=device)
    plan = launch.planner.plan("forward", VIEW, 4, launch.device_of(x), "two_launch")
    call = launch.Call("forward", VIEW, x, torch.float32, replace(plan, strategy=strategy))
    monkeypatch.setattr(launch, "INTERPRETED", False)

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    call.bound[(True, True), "key"] = refused
    if retreats:
        assert not call.launch(None, (x,), [(True, True)], "key")
    else:
        with pytest.raises(RuntimeError, match="Triton Error"):
            call.launch(None, (x,), [(True, True)], "key")
