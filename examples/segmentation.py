"""Segmentation with a residual U-Net of MONAI and two tiles a step: BatchNorm against Batch Renorm.

    pip install '.[examples]'
    python examples/segmentation.py            # half a minute on one core
    python examples/segmentation.py --quick    # a short run

Volumes and microscopy leave room for one or two tiles a step, and of one scan: here each step sees two tiles
that are either crowded with bright discs or all but empty, at one level of exposure. What BatchNorm learns to
call bright depends on how crowded the step was, which no step tells it in inference; Batch Renorm trains
with the statistics that it will infer with. The score is Dice's for the discs, 1 where every pixel is right.
"""

from __future__ import annotations

import argparse

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from triton_brn import Ramp, convert_batchnorm

SIZE = 48


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tiles (count, 1, SIZE, SIZE) of one scan, and where their discs are, 0 or 1."""

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    discs = 1 if random(1) < 0.5 else 16
    axis = torch.arange(SIZE) / SIZE
    y, x = random(count, discs, 1, 1), random(count, discs, 1, 1)
    radius = 0.03 + 0.09 * random(count, discs, 1, 1)
    inside = (axis[:, None] - y).square() + (axis - x).square() < radius.square()
    mask = inside.any(1, keepdim=True).float()
    exposure, noise = random(1) / 2 - 0.25, torch.randn(mask.shape, generator=generator) / 2
    return exposure + mask + noise, mask


def network(norm: str, steps: int) -> nn.Module:
    """MONAI's U-Net with two residual units a level."""
    torch.manual_seed(0)
    model = UNet(2, 1, 1, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2, norm="batch")
    if norm == "Batch Renorm":
        begin, end = steps // 10, steps // 2
        r_max, d_max = Ramp(1.0, 3.0, begin, end), Ramp(0.0, 5.0, begin, end)
        convert_batchnorm(model, r_max=r_max, d_max=d_max, momentum=0.02)
    return model


def train(model: nn.Module, steps: int, seed: int) -> None:
    """Adam, its learning rate falling to 0; two tiles a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        tiles, masks = draw(2, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(tiles), masks).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def dice(model: nn.Module, tiles: int = 50) -> float:
    """Twice the pixels in both prediction and truth over those in the one and in the other, tile by tile."""
    generator = torch.Generator().manual_seed(1_000)
    model.eval()
    both = either = 0.0
    for _ in range(tiles):
        tile, mask = draw(1, generator)
        found = (model(tile) > 0).float()
        both += 2 * (found * mask).sum().item()
        either += (found.sum() + mask.sum()).item()
    return both / max(either, 1.0)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the scores. Returns them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    steps = 40 if options.quick else options.steps
    found = {}
    for norm in ("BatchNorm", "Batch Renorm"):
        model = network(norm, steps)
        train(model, steps, options.seed)
        found[norm] = dice(model)
        print(f"{norm:12} after {steps} steps of 2 tiles: Dice {found[norm]:.3f}", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
