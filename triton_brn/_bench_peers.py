"""Whom BatchRenorm is measured against: what a user would pick instead, each in its best form."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

OURS = "triton_brn"
#: What the default ramps reach: whoever corrects is measured so.
LIMITS: dict[str, Any] = {"r_max": 3.0, "d_max": 5.0}
Call = Callable[[], object]


class EagerBatchRenorm(nn.Module):
    """Algorithm 1 as one writes it in PyTorch: what users have today, and what torch.compile gets."""

    running_mean: Tensor
    running_std: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.r_max, self.d_max = LIMITS["r_max"], LIMITS["d_max"]
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        column = (-1, *(1,) * (x.ndim - 2))
        x32 = x.to(self.weight.dtype)
        mean, std = self.running_mean, self.running_std
        if self.training:
            batch_mean = x32.mean(axes)
            batch_std = (x32.var(axes, unbiased=False) + self.eps).sqrt()
            r = (batch_std.detach() / std).clamp(1 / self.r_max, self.r_max)
            d = ((batch_mean.detach() - mean) / std).clamp(-self.d_max, self.d_max)
            x_hat = (x32 - batch_mean.view(column)) / batch_std.view(column) * r.view(column) + d.view(column)
            with torch.no_grad():
                mean += self.momentum * (batch_mean - mean)
                std += self.momentum * (batch_std - std)
        else:
            x_hat = (x32 - mean.view(column)) / std.view(column)
        return (x_hat * self.weight.view(column) + self.bias.view(column)).to(x.dtype)


class OnRows(nn.Module):
    """A layer of (N, C) on maps, through rows of (N*H*W, C): a view of channels_last, a copy of others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.layer(x)
        moved = x.movedim(1, -1)
        return self.layer(moved.reshape(-1, x.shape[1])).view(moved.shape).movedim(-1, 1)


def batch_norm(shape: Sequence[int]) -> nn.Module:
    """torch's layer for inputs of this shape."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return kinds[len(shape)](shape[1])


def batch_renorm(shape: Sequence[int], **options: Any) -> nn.Module:
    """Our layer for inputs of this shape; without options a new one, which does not correct yet."""
    kinds = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
    return kinds[len(shape)](shape[1], **options)


def _ours(shape: Sequence[int]) -> nn.Module:
    return batch_renorm(shape, **LIMITS)


def _plain(shape: Sequence[int]) -> nn.Module:
    return EagerBatchRenorm(shape[1])


def _torchrl(shape: Sequence[int]) -> nn.Module:
    # Takes maps as they are, and is 9 to 60 % faster so than on rows. It corrects from the first
    # step on: its cost does not depend on that.
    from torchrl.modules import BatchRenorm1d as TorchRL

    return TorchRL(shape[1], warmup_steps=0)


def _sb3_contrib(shape: Sequence[int]) -> nn.Module:
    # Its statistics are those of axis 0 alone. It corrects once steps > warmup_steps. Its variance is the
    # unbiased one, also where it normalises, and eps, 1e-3 unless given, is added after the division by r.
    from sb3_contrib.common.torch_layers import BatchRenorm1d as SB3

    return OnRows(SB3(shape[1], eps=1e-5, warmup_steps=-1))


@dataclass(frozen=True)
class Peer:
    """A contestant: how its layer is made, and in which form it runs."""

    name: str
    layer: Callable[[Sequence[int]], nn.Module]
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # torch.compile's
    package: str = ""  # that must be installed
    waits_for_host: bool = False  # asks the device for a number: no CUDA graph can hold it

    @property
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"left out: pip install {self.package.replace('_', '-')}"
        return ""

    @property
    def version(self) -> str:
        """The package and its version; empty for torch's and ours."""
        if not self.package:
            return ""
        try:
            return f"{self.name} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:  # found as a folder of sources
            return f"{self.name}, version unknown"

    def make(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer. Parameters and statistics are float32, float64 for float64."""
        module = self.layer(shape).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        if self.compiled:  # options, not a patched config: the compiler's caches tell them apart
            return torch.compile(module, dynamic=False, options=self.options or None)  # type: ignore[return-value]
        return module


def peers(device_type: str) -> list[Peer]:
    """All contestants; the first is ours, the second the one to beat."""
    found = [
        Peer(OURS, _ours),
        Peer("BatchNorm", batch_norm),
        Peer("BatchNorm compiled", batch_norm, compiled=True),
    ]
    if device_type == "cuda":  # as TORCHINDUCTOR_COOPERATIVE_REDUCTIONS=1
        options = {"triton.cooperative_reductions": True}
        found.append(Peer("BatchNorm compiled coop.", batch_norm, compiled=True, options=options))
    return [
        *found,
        Peer("plain PyTorch", _plain),
        Peer("plain PyTorch compiled", _plain, compiled=True),
        Peer("torchrl", _torchrl, package="torchrl"),
        Peer("sb3-contrib", _sb3_contrib, package="sb3_contrib", waits_for_host=True),
    ]


def call_of(layer: nn.Module, x: Tensor, dy: Tensor, direction: str) -> Call:
    """One call of ``direction``. "backward" is that of a forward which has run, on the current stream.

    dy is given to each layer in the dtype and layout of its own output.
    """
    layer.train(direction != "inference")
    inputs = [x, *layer.parameters()]
    if direction == "inference":

        def infer() -> object:
            with torch.no_grad():
                return layer(x)

        return infer
    if direction == "forward":
        return lambda: layer(x)
    y = layer(x)
    fitting = torch.empty_like(y, requires_grad=False).copy_(dy)
    if direction == "backward":
        return lambda: torch.autograd.grad(y, inputs, fitting, retain_graph=True)
    return lambda: torch.autograd.grad(layer(x), inputs, fitting)


def backward_can_be_repeated() -> AbstractContextManager[Any]:
    """torch.compile must not reuse the memory that a backward reads: "backward" runs it many times."""
    import torch._functorch.config as config

    return config.patch(donated_buffer=False)
