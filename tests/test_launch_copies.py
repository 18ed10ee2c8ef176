"""Kernels are compiled for the alignment of what they are given, which of a copy is not the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import inputs
from test_kernels import check, check_gradients, run

from triton_brn import batch_renorm

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

SHAPE = (4, 8, 8, 8)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, and a look at each launch: in Triton's interpreter nothing depends on alignment."""
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(launch, "_calls", {})
    launch_ = launch.Call.launch

    def seen(self: Any, kernel: Any, arguments: Any, phases: Any, key: Any) -> bool:
        x, second = arguments[:2]
        tensors = {"dy": second, "x": x} if kernel is launch.batch_renorm_backward_kernel else {"x": x}
        for (name, t), aligned in zip(tensors.items(), key[0], strict=False):
            assert aligned == (t.data_ptr() % 16 == 0), name
        return launch_(self, kernel, arguments, phases, key)

    monkeypatch.setattr(launch.Call, "launch", seen)


def misaligned(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t``; "gaps": not dense, either."""
    each = 2 if layout == "gaps" else 1
    return t.new_zeros(each * t.numel() + 1)[1:].view(*t.shape, each)[..., 0].copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_that_is_copied(dtype: torch.dtype, device) -> None:
    for layout in ("gaps", "offset"):  # the second is read as it is, by what the first had compiled
        case = inputs(SHAPE, dtype, device=device)
        case.x = misaligned(case.x, layout)
        assert case.x.data_ptr() % 16
        check(case)
        assert not batch_renorm(*case.args).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_that_is_copied(dtype: torch.dtype, training: bool, device) -> None:
    for layout in ("gaps", "offset"):
        case = inputs(SHAPE, dtype, device=device)
        before = inputs(SHAPE, dtype, device=device)
        case.dy = misaligned(case.dy, layout)
        grads = run(case, training=training)[1]
        check_gradients(grads, before, training=training, **({"step": 7} if training else {}))
