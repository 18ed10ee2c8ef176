"""BatchRenorm1d, 2d, 3d: drop-in layers for torch.nn.BatchNorm1d, 2d, 3d."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from .functional import batch_renorm
from .names import understand
from .ramp import Limit, Ramp, as_ramp, plain
from .validate import HALVES, Average, check_layer, check_numbers, statistics_dtype


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
    BatchNorm: batch renorm is lost. timm's unfreeze_batch_norm_2d gives BatchNorm2d back likewise.

    Set to False later, ``track_running_stats`` keeps the running statistics and the counter as they are: a
    training batch is still normalised by itself and corrected towards them. Where
    torch.func.replace_all_batch_norm_modules_ has taken the running statistics away, the layer is batch norm.
    With ``momentum=None`` and limits that are numbers, the first batch is not corrected: there is no average
    yet. So torch.optim.swa_utils.update_bn gives the cumulative average of the running statistics.

    Statistics in half precision lose what they are to remember. load_state_dict(assign=True) takes them as
    float32, weights likewise unless the layer's are in half precision already; a forward that finds them
    (FSDP's buffer_dtype) makes them float32, with a warning.

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
        running_average: Average = "std",
    ) -> None:
        check_numbers(momentum, eps, running_average)
        check_layer(num_features, track_running_stats)
        momentum = momentum if momentum is None else plain(momentum)
        stats = statistics_dtype(dtype or torch.get_default_dtype())
        super().__init__(int(num_features), plain(eps), momentum, False, True, device=device, dtype=stats)
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
        self._r_max, self._r_max_of_averages = checked_limit("r_max", limit, 1.0)

    @property
    def d_max(self) -> Limit:
        """The clipping limit of d: a number >= 0, None or a Ramp."""
        return self._d_max

    @d_max.setter
    def d_max(self, limit: Limit) -> None:
        self._d_max, self._d_max_of_averages = checked_limit("d_max", limit, 0.0)

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
        mean, var, step, weight, bias = self._tensors()
        r_max, d_max, momentum = self._r_max, self._d_max, self.momentum
        if momentum is None:
            r_max, d_max = self._r_max_of_averages, self._d_max_of_averages
        if not self.track_running_stats:
            if mean is None or var is None:
                return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
            if self.training:  # the mean stays the same tensor, by which checkpointing knows the layer
                momentum, var, step = 0.0, var.clone(), step.clone()
        elif mean.dtype in HALVES:
            self._restore_statistics()
        return batch_renorm(
            input,
            mean,
            var,
            weight,
            bias,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            r_max=r_max,
            d_max=d_max,
            num_batches_tracked=step,
            running_average=self.running_average,
        )

    def _tensors(self) -> tuple[Any, ...]:
        """Running mean, running variance, counter, weight and bias, wherever they are."""
        buffers, parameters = self._buffers, self._parameters
        try:  # spares five calls of Module.__getattr__, 2.5 us on the host
            statistics = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            return *statistics, parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, pruned, replicated, sharded
            return self.running_mean, self.running_var, self.num_batches_tracked, self.weight, self.bias

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
            f"{'' if self.track_running_stats else 'track_running_stats=False, '}"
            f"bias={self.bias is not None}, r_max={self.r_max}, d_max={self.d_max}, "
            f"running_average={self.running_average!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchRenorm:
        def kept(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype == t.dtype:
                return out
            if not t.is_floating_point():  # Module.type casts the counter too
                return t.to(out.device)
            return t.float().to(out.device) if out.dtype in HALVES else out

        return super()._apply(kept, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        understand(state_dict, prefix, self.eps, self.affine)
        if local_metadata.get("assign_to_params_buffers", False):
            self._cast_entries(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _cast_entries(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Entries that take the place of ours get the dtypes that a forward can use."""

        def cast(name: str, dtype: torch.dtype) -> None:
            entry = state_dict.get(prefix + name)
            if isinstance(entry, Tensor) and entry.dtype != dtype:
                state_dict[prefix + name] = entry.detach().to(dtype)

        learned = self.weight
        for name in ("weight", "bias"):
            entry = state_dict.get(prefix + name)
            if isinstance(entry, Tensor) and learned is not None and entry.dtype in HALVES:
                cast(name, learned.dtype if learned.dtype in HALVES else torch.float32)
        like = state_dict.get(prefix + ("running_mean" if learned is None else "weight"))
        if isinstance(like, Tensor):
            cast("running_mean", statistics_dtype(like.dtype))
            cast("running_var", statistics_dtype(like.dtype))
        cast("num_batches_tracked", torch.int64)

    def _restore_statistics(self) -> None:
        """Undo a cast that did not come through ``_apply``."""
        warnings.warn(
            f"running statistics in {self.running_mean.dtype} become float32, as they have to accumulate "
            "small updates. With FSDP, buffer_dtype=torch.float32 keeps what the cast rounds off.",
            stacklevel=5,  # whoever calls the layer
        )
        for statistics in (self.running_var, self.running_mean):  # the mean last: forward looks at it
            statistics.data = statistics.data.float()


def checked_limit(name: str, limit: Limit, neutral: float) -> tuple[Limit, Limit]:
    """A user's limit, and what it is for cumulative averages: these begin with the first batch, which has
    none to be corrected towards."""
    ramp = as_ramp(name, limit, neutral)
    if isinstance(limit, Ramp):
        return limit, limit
    finite = min(ramp.stop, 1e30)  # what a Ramp takes; float32 holds 1e8 times it
    return limit if limit is None else plain(limit), Ramp(neutral, finite, 0, 1)


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
