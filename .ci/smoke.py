"""An installed triton_brn, away from its checkout: one training step and one inference."""

import importlib.metadata
import importlib.util

import torch

import triton_brn
from triton_brn import BatchRenorm2d

assert "site-packages" in triton_brn.__file__, triton_brn.__file__
assert importlib.util.find_spec("kernels") is None, "a top-level module named kernels was installed"
assert importlib.util.find_spec("triton_brn.kernels") is not None
files = [str(f) for f in importlib.metadata.files("triton_brn")]
assert "triton_brn/py.typed" in files

layer = BatchRenorm2d(3, r_max=3.0, d_max=5.0)
x = torch.randn(4, 3, 5, 5, requires_grad=True)
layer(x).square().sum().backward()
assert x.grad.isfinite().all()
assert layer.num_batches_tracked.item() == 1
assert layer.eval()(x).isfinite().all()
print("triton_brn", triton_brn.__version__, "works from", triton_brn.__file__)
