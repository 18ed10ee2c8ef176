"""A training step of a whole network: ResNet-18 or 50 with BatchNorm, with ours, with the plain version."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import progress
from ._bench_measure import (
    QUICK,
    Call,
    Effort,
    keep_freed_memory,
    peak_memory,
    quantile,
    ratio,
    rounds,
    stamp,
    wall_clock,
)
from ._bench_peers import LIMITS, OURS, EagerBatchRenorm
from ._bench_plans import joined, plans_of
from .convert import convert_batchnorm
from .modules import BatchRenorm2d

CLASSES = 1000
#: Blocks of each stage, and whether they have a bottleneck (He et al. 2015, table 1).
DEPTHS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
MODEL_EFFORT = Effort(seconds=30, least=5, most=40)


class Block(nn.Module):
    """Convolutions, each normalised, around which the input is added."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = width * (4 if bottleneck else 1)
        if bottleneck:
            sizes = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            sizes = [(channels, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for into, to, kernel, step in sizes:
            layers += [convolution(into, to, kernel, step), nn.BatchNorm2d(to), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(convolution(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    """Without bias: a normalisation follows."""
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def resnet(name: str) -> nn.Sequential:
    """ResNet-18 or 50 with BatchNorm: (N, 3, H, W) to (N, 1000)."""
    depths, bottleneck = DEPTHS[name]
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(Block(channels, 64 << stage, stride, bottleneck))
            channels = (64 << stage) * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def with_plain(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d replaced by batch renorm in plain PyTorch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, EagerBatchRenorm(child.num_features))
        else:
            with_plain(child)
    return module


#: How each contestant is made of the network with BatchNorm.
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    OURS: functools.partial(convert_batchnorm, **LIMITS),
    "BatchNorm": lambda model: model,
    "plain PyTorch": with_plain,
}


@dataclass(frozen=True)
class ModelRow:
    """One contestant's training step."""

    model: str
    peer: str
    batch: int
    image: int  # pixels a side
    dtype: str  # of the activations
    layout: str
    strategies: str  # of all our layers' plans; "eager": torch's own kernels
    planned_by: str  # those plans: "planner", "tuned" or "retreat", see _bench_plans
    ms: float  # wall clock, median
    ms_q20: float
    ms_q80: float
    images_per_second: float
    speedup: float  # of triton_brn over this contestant: median over rounds
    peak_mib: float | None  # CUDA: held by a step at most, beyond parameters and optimizer
    device: str
    python: str
    torch: str
    triton: str
    triton_brn: str


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Call:
    """Forward, cross-entropy, backward and SGD; in bfloat16 (autocast) on a GPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    autocast: Any = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def plans_in(model: nn.Module, step: Call) -> list[tuple[str, str]]:
    """Of all our layers, see ``plans_of``, on what they get in a step."""
    found: list[tuple[str, str]] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.extend(plans_of(args[0], "both"))

    ours = [layer for layer in model.modules() if isinstance(layer, BatchRenorm2d)]
    hooks = [layer.register_forward_pre_hook(hook) for layer in ours]
    step()
    for handle in hooks:
        handle.remove()
    return found


def measure_model(
    name: str, device: torch.device, batch: int, image: int, channels_last: bool, effort: Effort
) -> list[ModelRow]:
    """Training steps of the contestants, in turns."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    images = torch.randn(batch, 3, image, image).to(device, memory_format=form)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    steps = {}
    plans: list[tuple[str, str]] = []
    for peer, variant in VARIANTS.items():
        torch.manual_seed(0)
        model = variant(resnet(name)).to(device).to(memory_format=form)  # type: ignore[call-overload]
        steps[peer] = training_step(model, images, labels)
        steps[peer]()
        if peer == OURS:
            plans = plans_in(model, steps[peer])
    cuda = device.type == "cuda"
    if not cuda:
        keep_freed_memory()
    wait: Call = torch.cuda.synchronize if cuda else lambda: None
    times = rounds(steps, wall_clock(1, wait), effort)
    return [
        ModelRow(
            model=name,
            peer=peer,
            batch=batch,
            image=image,
            dtype="bf16 (autocast)" if cuda else "fp32",
            layout="channels_last" if channels_last else "contiguous",
            strategies=joined(strategy for strategy, _ in plans),
            planned_by=joined(who for _, who in plans),
            ms=statistics.median(seconds) * 1e3,
            ms_q20=quantile(seconds, 0.2) * 1e3,
            ms_q80=quantile(seconds, 0.8) * 1e3,
            images_per_second=batch / statistics.median(seconds),
            speedup=ratio(times, peer, OURS),
            peak_mib=peak_memory(steps[peer]) if cuda else None,
            **stamp(device),
        )
        for peer, seconds in times.items()
    ]


def run_model(
    name: str,
    device: torch.device,
    batches: Sequence[int] | None = None,
    *,
    quick: bool = False,
    channels_last: bool = False,
    out: str | Path = "triton_brn_bench",
) -> list[ModelRow]:
    """Measure a whole network, print a table and write ``name``.csv and ``name``.json to ``out``.

    Args:
        name: "resnet18" or "resnet50".
        device: a CPU or CUDA device.
        batches: images in a step, one table line each; None: 4 of 64x64 on a CPU, 32 of 224x224 on a GPU.
        quick: fewer rounds.
        channels_last: images and weights in channels_last.
        out: a folder, made where there is none.
    """
    from ._bench_report import print_models, write

    cuda = device.type == "cuda"
    image = 224 if cuda else 64
    batches = batches or [32 if cuda else 4]
    effort = QUICK if quick else MODEL_EFFORT
    about = progress.minutes(len(batches) * effort.seconds * 1.2)
    print(f"{name}, {len(batches)} batch sizes on {device}: about {about}", file=sys.stderr)
    rows: list[ModelRow] = []
    paths: list[Path] = []
    with progress.bar(len(batches), "batch") as bar:
        try:
            for batch in batches:
                rows += measure_model(name, device, batch, image, channels_last, effort)
                paths = write(rows, Path(out), name)
                bar.update()
        except KeyboardInterrupt:
            if not rows:
                raise SystemExit("bench: interrupted, nothing was measured") from None
            bar.write("Interrupted: what was measured follows.")
    print_models(rows)
    print(f"Written to {out}: {', '.join(path.name for path in paths)}")
    return rows
