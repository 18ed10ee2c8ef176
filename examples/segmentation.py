"""Segmentation with a residual U-Net of MONAI and two images a step: BatchNorm against Batch Renorm.

    pip install '.[examples]'
    python examples/segmentation.py            # 4 minutes on one core
    python examples/segmentation.py --quick    # a short run

Volumes and microscopy leave room for one or two images a step. The script draws such images: bright discs
on a background whose level and noise differ from image to image, as exposure and stain do. Each step sees
two images of the same level, as two tiles of one scan. What is to be found are the discs; the score is
Dice's, 1 where every pixel is right.
"""

from __future__ import annotations

import argparse

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from triton_brn import Ramp, convert_batchnorm

SIZE = 64


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIZE, SIZE) of one exposure, and where their discs are, 0 or 1."""

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    axis = torch.arange(SIZE) / SIZE
    discs = 6
    y, x = random(count, discs, 1, 1), random(count, discs, 1, 1)
    radius = 0.05 + 0.1 * random(count, discs, 1, 1)
    inside = (axis[:, None] - y).square() + (axis - x).square() < radius.square()
    mask = inside.any(1, keepdim=True).float()
    level, contrast = 4 * random(1) - 2, 0.5 + random(1)
    noise = torch.randn(mask.shape, generator=generator) * (0.2 + 0.4 * random(1))
    return level + contrast * mask + noise, mask


def network(norm: str, steps: int) -> nn.Module:
    """MONAI's U-Net with two residual units a level."""
    torch.manual_seed(0)
    model = UNet(2, 1, 1, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2, norm="batch")
    if norm == "Batch Renorm":
        r_max, d_max = (Ramp(1.0, stop, steps // 10, steps // 2) for stop in (3.0, 5.0))
        convert_batchnorm(model, r_max=r_max, d_max=d_max, momentum=0.02)
    return model


def train(model: nn.Module, steps: int, seed: int) -> None:
    """Adam; two images a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    for _ in range(steps):
        images, masks = draw(2, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), masks).backward()
        optimizer.step()


@torch.no_grad()
def dice(model: nn.Module, images: int = 50) -> float:
    """Twice the pixels in both prediction and truth over the pixels in either, of images one by one."""
    generator = torch.Generator().manual_seed(1_000)
    model.eval()
    both = either = 0.0
    for _ in range(images):
        image, mask = draw(1, generator)
        found = (model(image) > 0).float()
        both += 2 * (found * mask).sum().item()
        either += (found.sum() + mask.sum()).item()
    return both / max(either, 1.0)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the scores. Returns them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    steps = 40 if options.quick else options.steps
    found = {}
    for norm in ("BatchNorm", "Batch Renorm"):
        model = network(norm, steps)
        train(model, steps, options.seed)
        found[norm] = dice(model)
        print(f"{norm:12} after {steps} steps of 2 images: Dice {found[norm]:.3f}", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
