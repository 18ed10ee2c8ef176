"""Independent oracles: torch.nn.BatchNorm, and the batch renormalisation of torchrl."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

pytestmark = pytest.mark.usefixtures("backend")

CASES = [
    (BatchRenorm1d, nn.BatchNorm1d, (16, 5)),
    (BatchRenorm1d, nn.BatchNorm1d, (4, 5, 9)),
    (BatchRenorm2d, nn.BatchNorm2d, (4, 5, 3, 7)),
    (BatchRenorm3d, nn.BatchNorm3d, (2, 5, 3, 3, 4)),
]


def drifting(shape: tuple[int, ...], device: torch.device, steps: int = 5) -> list[Tensor]:
    """Batches whose mean and scale move away from the running statistics, each channel its own way."""
    channel = torch.arange(shape[1], device=device).view(1, -1, *[1] * (len(shape) - 2))
    scale = 0.3 + channel
    return [
        torch.randn(shape, device=device) * scale * (1 + 0.4 * i) + (channel - 2) * i for i in range(steps)
    ]


def train(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients and statistics of one step."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), layer.running_mean, layer.running_var]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal up to rounding, relative to each tensor's largest value."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.detach().abs().max().item())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("renorm", "norm", "shape"), CASES)
def test_without_correction_it_is_batch_norm(renorm, norm, shape, momentum, device) -> None:
    ours = renorm(5, momentum=momentum, r_max=1.0, d_max=0.0, running_average="var").to(device)
    theirs = norm(5, momentum=momentum).to(device)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for x in drifting(shape, device):
        dy = torch.randn_like(x)
        assert_same(train(ours, x, dy), train(theirs, x, dy))
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    assert_same(list(ours.buffers())[:2], list(theirs.buffers())[:2])
    assert_same([ours.eval()(x)], [theirs.eval()(x)])


def test_channels_last_is_batch_norm_too(device) -> None:
    ours = BatchRenorm2d(5, r_max=1.0, d_max=0.0, running_average="var").to(device)
    theirs = nn.BatchNorm2d(5, momentum=0.01).to(device)
    for x in drifting((4, 5, 3, 7), device, steps=2):
        x = x.contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(x)
        assert_same(train(ours, x, dy), train(theirs, x, dy))


@pytest.fixture(scope="module")
def torchrl() -> ModuleType:
    """torchrl's one file, loaded by itself: the package around it takes seconds to import."""
    path = importlib.metadata.distribution("torchrl").locate_file("torchrl/modules/models/batchrenorm.py")
    spec = importlib.util.spec_from_file_location("torchrl_batchrenorm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.2, 0.3)])
@pytest.mark.parametrize(("renorm", "_norm", "shape"), CASES)
def test_torchrl(torchrl: ModuleType, renorm, _norm, shape, r_max, d_max, device) -> None:
    settings = {"momentum": 0.2, "eps": 1e-3}
    ours = renorm(5, r_max=r_max, d_max=d_max, running_average="var", **settings).to(device)
    theirs = torchrl.BatchRenorm1d(5, max_r=r_max, max_d=d_max, warmup_steps=0, **settings).to(device)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict({**theirs.state_dict()})
    n, m = shape[0], torch.Size(shape).numel() // shape[1]
    for x in drifting(shape, device):
        before = theirs.running_var.clone()
        dy = torch.randn_like(x)
        *found, ours_var = train(ours, x, dy)
        *expected, theirs_var = train(theirs, x, dy)
        assert_same(found, expected)
        # torchrl corrects the variance with n/(n-1), n the first axis alone; the count is m.
        biased = ((theirs_var - before) / 0.2 + before) * (n - 1) / n
        assert_same([ours_var], [before + 0.2 * (biased * m / (m - 1) - before)])
        theirs.running_var.copy_(ours.running_var)
    assert_same([ours.eval()(x)], [theirs.eval()(x)])
