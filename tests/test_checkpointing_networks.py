"""Networks whose authors checkpoint them: gradients and statistics are the plain network's, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from test_checkpointing import assert_same
from torch import Tensor, nn

from triton_brn import convert_batchnorm


def converted(model: nn.Module) -> nn.Module:
    """With limits that act, and statistics that the batches are far from."""
    model = convert_batchnorm(model, r_max=3.0, d_max=5.0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.train()


def everything(model: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_timm(layout: torch.memory_format, autocast: bool, eager: None, device) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = converted(timm.create_model("resnet18", num_classes=10)).to(device)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=layout)
    assert_same(everything(other, x, autocast), everything(model, x, autocast))


def test_torchvision(eager: None, device) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = converted(torchvision.models.DenseNet(8, (2, 2), 16)).to(device)
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = True
    x = torch.randn(2, 3, 32, 32, device=device)
    assert_same(everything(other, x, False), everything(model, x, False))
