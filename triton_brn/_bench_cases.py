"""What is measured: inputs from networks that people train, by preset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .validate import NAMED_DTYPES

Shape = tuple[int, ...]

DIRECTIONS = ("forward", "backward", "both", "inference")
#: Tensors that a direction must read or write once: x, y; x, dy, dx; all of them.
IDEAL_TENSORS = {"forward": 2, "backward": 3, "both": 5, "inference": 2}
LAYOUTS = ("contiguous", "channels_last")

#: (channels, height) of all batch normalisations, each once, by depth: ResNet-50 at 224 x 224, and
#: Inception-v3 at 299 x 299 without its auxiliary head.
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)
INCEPTION = (
    *((32, 149), (32, 147), (64, 147), (80, 73), (192, 71), (64, 35), (48, 35), (96, 35), (32, 35)),
    *((384, 17), (96, 17), (128, 17), (160, 17), (192, 17), (320, 8), (192, 8), (384, 8), (448, 8)),
)
ODD = ((32, 149), (96, 35), (192, 17), (512, 7))
ON_IMAGES = {"resnet50": RESNET50, "inception": INCEPTION, "odd": ODD}
PRESETS = ("default", *ON_IMAGES, "crossq", "3d")


@dataclass(frozen=True)
class Case:
    """One input."""

    shape: Shape
    dtype: str = "fp32"  # a key of NAMED_DTYPES
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.size} {self.dtype} {self.layout}"

    @property
    def size(self) -> str:
        """The shape, to be read."""
        return "x".join(map(str, self.shape))

    @property
    def tensor_bytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * NAMED_DTYPES[self.dtype].itemsize

    def ideal_bytes(self, direction: str) -> int:
        """What a direction must move when each tensor is read or written once."""
        return self.tensor_bytes * IDEAL_TENSORS[direction]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """x, which requires grad, and dy; seeded by the shape alone.

        The channels differ in mean and deviation, so that some of them are clipped and some are not.
        """
        generator = torch.Generator().manual_seed(math.prod(self.shape))
        channels = (1, self.shape[1], *(1,) * (len(self.shape) - 2))
        x = torch.randn(self.shape, generator=generator)
        x = x * torch.rand(channels, generator=generator).mul_(3.5).add_(0.5) + torch.randn(
            channels, generator=generator
        )
        made = []
        for t in (x, torch.randn(self.shape, generator=generator)):
            t = t.to(device, NAMED_DTYPES[self.dtype])
            if self.layout == "channels_last":
                t = t.contiguous(memory_format=memory_format(len(self.shape)))
            made.append(t)
        return made[0].requires_grad_(), made[1]


def memory_format(ndim: int) -> torch.memory_format:
    """channels_last of so many dimensions."""
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def preset_shapes(preset: str, batches: tuple[int, ...]) -> list[Shape]:
    """The shapes of a preset; ``batches`` for those of networks on images."""
    if preset == "crossq":
        return [(512, channels) for channels in (256, 512, 1024, 2048)]
    if preset == "3d":
        return [(2, 32, 96, 96, 96)]
    return [(n, channels, size, size) for n in batches for channels, size in ON_IMAGES[preset]]


def default_cases(dtype: str, large: bool, quick: bool) -> list[Case]:
    """A few small inputs of each kind; ``large``: also one that a GPU needs to be busy."""
    if quick:
        return [Case((4, 64, 56, 56), dtype), Case((512, 256), dtype)]
    batches = (32, 8, 2, 256) if large else (32, 8, 2)
    shapes: list[Shape] = [(n, 64, 56, 56) for n in batches]
    shapes += [(4, 96, 35, 35), (32, 512, 7, 7), (512, 1024), (512, 256)]
    cases = [Case(shape, dtype) for shape in shapes]
    cases.insert(1, Case((32, 64, 56, 56), dtype, "channels_last"))
    return cases
