"""What a profiler's table calls this package's work."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from triton_brn import BatchRenorm2d


@pytest.mark.parametrize("training", [True, False])
def test_rows_say_batch_renorm(training: bool, backend: str, device) -> None:
    layer = BatchRenorm2d(3, r_max=3.0, d_max=5.0).train(training).to(device)
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(x).sum().backward()
    rows = {row.key for row in seen.key_averages() if "BatchRenorm" in row.key}
    assert any(row.endswith("Backward") for row in rows), rows
    assert any(not row.endswith("Backward") for row in rows), rows
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(x)
    assert any("BatchRenorm" in row.key for row in seen.key_averages())


def test_kernels_are_named() -> None:
    """A function's name is its row's in a profile of the device."""
    triton = pytest.importorskip("triton")
    from triton_brn.kernels import backward, forward, inference

    names = {
        name
        for module in (forward, backward, inference)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.KernelInterface) and name.endswith("_kernel")
    }
    assert names == {f"batch_renorm_{which}_kernel" for which in ("forward", "backward", "inference")}
