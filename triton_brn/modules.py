"""BatchRenorm1d, 2d, 3d: drop-in layers for torch.nn.BatchNorm1d, 2d, 3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from .functional import batch_renorm
from .ramp import Limit, Ramp, as_ramp
from .validate import check_numbers, statistics_dtype


class _BatchRenorm(nn.modules.batchnorm._BatchNorm):
    """What the layers share; the subclasses say which ranks they take.

    Args:
        num_features: C, the size of the input's second axis.
        eps: added to the variance inside the square root (torch's default; the paper gives none).
        momentum: alpha in the paper and in torch's convention: the weight of the new batch.
            None: the cumulative average.
        affine: learn ``weight`` (gamma) and ``bias`` (beta).
        track_running_stats: only True: batch renorm without running statistics is batch norm.
        r_max, d_max: clipping limits of Algorithm 1: a number, None (no clipping) or a ``Ramp``
            over ``num_batches_tracked``; may be set again at any time. Default: the paper's.
        running_average: ``"std"`` averages the standard deviation (the paper), ``"var"`` the
            unbiased variance (torch.nn.BatchNorm).
        device, dtype: of the parameters; the running statistics are float32, or float64 for float64.
        bias: False: learn ``weight`` alone.

    Parameters ``weight`` and ``bias`` and buffers ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` have the names and meaning of torch.nn.BatchNorm's, so state_dicts go
    both ways. ``.half()`` and ``.bfloat16()`` leave them in float32.

    The layers are torch.nn.BatchNorm1d, 2d and 3d to whoever asks isinstance, so what looks for those finds
    them. torch.nn.SyncBatchNorm.convert_sync_batchnorm then replaces them by SyncBatchNorm, as it does every
    BatchNorm: batch renorm is lost.

    See ``batch_renorm`` for the mathematics and the errors.
    """

    _ranks: tuple[int, ...] = ()

    __jit_unused_properties__ = ("r_max", "d_max")

    if TYPE_CHECKING:  # torch.jit.script reads annotations, and not all that Python has
        weight: nn.Parameter | None  # type: ignore[assignment]
        bias: nn.Parameter | None  # type: ignore[assignment]
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: Limit = Ramp(1.0, 3.0, begin=5_000, end=40_000),
        d_max: Limit = Ramp(0.0, 5.0, begin=5_000, end=25_000),
        running_average: str = "std",
    ) -> None:
        check_numbers(momentum, eps, running_average)
        if not track_running_stats:
            raise ValueError(
                "track_running_stats: expected True, got False: without running statistics batch renorm is "
                "batch norm, use torch.nn.BatchNorm"
            )
        stats = statistics_dtype(dtype or torch.get_default_dtype())
        super().__init__(num_features, eps, momentum, False, True, device, stats)
        self.affine = affine
        self.r_max = r_max
        self.d_max = d_max
        self.running_average = running_average
        for name, learned in (("weight", affine), ("bias", affine and bias)):
            if learned:
                setattr(self, name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)))
        self.reset_parameters()
        if type(self).__module__.partition(".")[0] == "triton_brn":  # not somebody's subclass
            self.__module__ = nn.BatchNorm2d.__module__  # torch.fx keeps whole what is at home in torch.nn

    @property
    def r_max(self) -> Limit:
        """The clipping limit of r: a number >= 1, None or a Ramp."""
        return self._r_max

    @r_max.setter
    def r_max(self, limit: Limit) -> None:
        as_ramp("r_max", limit, 1.0)
        self._r_max = limit

    @property
    def d_max(self) -> Limit:
        """The clipping limit of d: a number >= 0, None or a Ramp."""
        return self._d_max

    @d_max.setter
    def d_max(self, limit: Limit) -> None:
        as_ramp("d_max", limit, 0.0)
        self._d_max = limit

    def reset_parameters(self) -> None:
        """As torch.nn.BatchNorm: weight 1, bias 0, running statistics reset."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self._ranks:
            ranks = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"input: expected {ranks} input for {type(self).__name__}, got {input.ndim}D")

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        if input.ndim not in self._ranks:
            self._check_input_dim(input)
        return batch_renorm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            r_max=self._r_max,
            d_max=self._d_max,
            num_batches_tracked=self.num_batches_tracked,
            running_average=self.running_average,
        )

    def _scripted(self, input: Tensor) -> Tensor:
        """What torch.jit.script makes of the layer."""
        if self.training:
            raise RuntimeError(
                "torch.jit.script: BatchRenorm layers are scripted for inference only: call .eval() on the "
                "scripted model, and train the original, or compile it by torch.compile"
            )
        dtype = self.running_mean.dtype
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, r_max={self.r_max}, d_max={self.d_max}, "
            f"running_average={self.running_average!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchRenorm:
        def keep_float32(t: Tensor) -> Tensor:
            out = fn(t)
            lowered = out.dtype in (torch.float16, torch.bfloat16) and out.dtype != t.dtype
            return t.float().to(out.device) if lowered else out

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        key = prefix + "num_batches_tracked"
        if local_metadata.get("version", 1) < 2 and key not in state_dict:
            counter = self.num_batches_tracked  # the checkpoint is older than the counter
            state_dict[key] = torch.zeros_like(counter, device="cpu") if counter.is_meta else counter
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    __doc__ = (
        "Batch Renormalization of (N, C) or (N, C, L) inputs.\n"
        + (_BatchRenorm.__doc__ or "").split("\n", 1)[1]
    )
    _ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    __doc__ = (
        "Batch Renormalization of (N, C, H, W) inputs.\n" + (_BatchRenorm.__doc__ or "").split("\n", 1)[1]
    )
    _ranks = (4,)


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    __doc__ = (
        "Batch Renormalization of (N, C, D, H, W) inputs.\n" + (_BatchRenorm.__doc__ or "").split("\n", 1)[1]
    )
    _ranks = (5,)
