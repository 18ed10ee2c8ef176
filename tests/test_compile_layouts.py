"""Inductor's code of a network: no more transposes and copies than with BatchNorm, and the same in eval."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from test_compile import inductor_works
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from triton_brn import BatchRenorm2d


class Residual(nn.Module):
    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.relu(self.body(x) + x).mean((2, 3))


def code_of(run: Callable[[], object]) -> str:
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False), config.patch(fx_graph_cache=False):
        return "\n".join(run_and_get_code(run)[1])


def moves(norm: Callable[..., nn.Module]) -> tuple[int, int]:
    """Transposes and loops over tensors in the code of one training step."""
    model, x = Residual(norm), torch.randn(2, 3, 16, 16)
    code = code_of(lambda: torch.compile(model)(x).sum().backward())
    assert ("triton_brn" in code) == (norm is BatchRenorm2d)
    return code.count("transpose_mxn<"), len(re.findall(r"^ +cpp_fused\w*\(", code, re.MULTILINE))


def test_no_more_transposes_than_batchnorm(eager: None) -> None:
    """The input is contiguous, which Inductor's convolutions are not."""
    if reason := inductor_works():
        pytest.skip(reason)
    ours, theirs = moves(BatchRenorm2d), moves(nn.BatchNorm2d)
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]


@pytest.mark.parametrize("freezing", [True, False])
def test_inference_is_batchnorms(freezing: bool, eager: None) -> None:
    """Folded into the convolutions where parameters are frozen."""
    if reason := inductor_works():
        pytest.skip(reason)
    x = torch.randn(2, 3, 16, 16)
    codes = []
    for norm in (BatchRenorm2d, nn.BatchNorm2d):
        model = Residual(norm).eval()
        with torch.no_grad(), config.patch(freezing=freezing):
            code = code_of(lambda: torch.testing.assert_close(torch.compile(model)(x), model(x)))  # noqa: B023
        codes.append(sorted(re.sub(r"#.*|'[^']*'|\barg\d+", "", code).splitlines()))
    assert codes[0] == codes[1]
