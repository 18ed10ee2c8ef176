"""The operators torch sees: schemas, fake kernels, and the choice between Triton and plain PyTorch.

``Library.define/impl`` with a mutable schema costs 7 us per forward+backward call on the host;
``custom_op`` costs 100 and fails ``opcheck`` when inputs require grad.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _AutoDispatchBelowAutograd,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function
from torch.compiler import is_dynamo_compiling

from . import checkpointing, eager, traces
from .backend import uses_triton

NAMESPACE = "triton_brn"
_library = torch.library.Library(NAMESPACE, "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# saved is (5, C): mean, what rounding took from it, 1/sigma_B, r, d.
# r_max and d_max are (start, stop, begin, end).
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!)? num_batches_tracked, float momentum, float eps, float[] r_max, float[] d_max,"
    " bool average_std) -> (Tensor y, Tensor saved)",
    tags=_tags,
)
# The two halves of forward, for a graph whose backward runs the second one again.
_library.define(
    "statistics(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!)? num_batches_tracked, float momentum, float eps, float[] r_max, float[] d_max,"
    " bool average_std) -> Tensor saved",
    tags=_tags,
)
_library.define("normalise(Tensor x, Tensor? weight, Tensor? bias, Tensor saved) -> Tensor y", tags=_tags)
_library.define(
    "inference(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps,"
    " bool save) -> (Tensor y, Tensor saved)",
    tags=_tags,
)
_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor saved, bool training, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_tags,
)


class _Eager:
    """The operators in plain PyTorch."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        y, saved = eager.forward(*args)
        return y, eager.stacked(saved)

    @staticmethod
    def kept_forward(*args: Any) -> tuple[Tensor, Tensor, Any]:
        y, saved = eager.forward(*args)
        return y, eager.stacked(saved), saved

    @staticmethod
    def again(x: Tensor, weight: Any, bias: Any, saved: eager.Saved) -> tuple[Tensor, Tensor]:
        return eager.again(x, saved), eager.stacked(saved)

    @staticmethod
    def statistics(*args: Any) -> Tensor:
        y, numbers = eager.forward(*args)
        saved = eager.stacked(numbers)
        saved._triton_brn_y, saved._triton_brn_numbers = y, numbers  # type: ignore[attr-defined]
        return saved

    @staticmethod
    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor) -> Tensor:
        y = saved.__dict__.pop("_triton_brn_y", None)
        numbers = saved.__dict__.get("_triton_brn_numbers")  # with them y is the same to the bit
        if y is None:
            y = eager.normalise(x, weight, bias, saved) if numbers is None else eager.again(x, numbers)
        return y

    inference = staticmethod(eager.inference)

    @staticmethod
    def backward(dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, *flags: Any) -> Any:
        return eager.backward(dy, x, weight, eager.unstacked(saved), *flags)


def _backend(device: torch.device) -> ModuleType | type[_Eager]:
    """What serves ``device``; the Triton module is imported when first needed."""
    if uses_triton(device):
        from . import launch

        return launch
    return _Eager


def _operator(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation. Its first argument, x or dy, says the device and whether there is work.

    Autograd looks at the Functions around the operators, never inside one. An empty batch changes
    nothing and is served here: torch's own kernels divide by zero there.
    """

    def run(*args: Any) -> Any:
        with _AutoDispatchBelowAutograd():  # saves 2 us per torch operation where inputs require grad
            if args[0].numel() == 0:
                made = fake(*args)
                return made.zero_() if isinstance(made, Tensor) else tuple(t.zero_() for t in made)
            return getattr(_backend(args[0].device), name)(*args)

    return run


def _repeated_forward(*args: Any) -> Any:
    """``forward`` where it may run again, or runs again: see checkpointing.py."""
    x, weight, bias = args[:3]
    if not checkpointing.acts() or x.numel() == 0:
        return _implementations["forward"](*args)
    with _AutoDispatchBelowAutograd():
        where, kept = checkpointing.call_of(x)
        backend = _backend(x.device)
        if kept is not None:
            return backend.again(x, weight, bias, kept.numbers)
        y, saved, numbers = backend.kept_forward(*args)
        where.keep(x, numbers, args[6])
        return y, saved


def _forward_fake(x, weight, bias, running_mean, running_var, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), running_mean.new_empty((5, x.shape[1]))


def _statistics_fake(*args: Any) -> Tensor:
    return _forward_fake(*args)[1]


def _normalise_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _inference_fake(x, weight, bias, running_mean, running_var, eps, save):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), running_mean.new_empty((5, x.shape[1]) if save else (0,))


def _backward_fake(dy, x, weight, saved, training, needs):  # type: ignore[no-untyped-def]
    like = saved if weight is None else weight
    vector = like.new_empty(x.shape[1] if needs[1] or needs[2] else 0)
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    return dx, vector, torch.empty_like(vector)


_implementations: dict[str, Callable[..., Any]] = {}
for _name, _fake in (
    ("forward", _forward_fake),
    ("statistics", _statistics_fake),
    ("normalise", _normalise_fake),
    ("inference", _inference_fake),
    ("backward", _backward_fake),
):
    _implementations[_name] = _operator(_name, _fake)
    _library.impl(
        _name,
        _repeated_forward if _name == "forward" else _implementations[_name],
        "CompositeExplicitAutograd",
    )
    # Torch's own copies of negative views serve no operator that updates several tensors; both backends do.
    _library.impl(_name, torch.library.fallthrough_kernel, "Negative")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


def implement(name: str, function: Callable[..., Any], key: str) -> None:
    """What an operator does where the dispatcher comes to ``key``."""
    _library.impl(name, function, key)


def dispatch(name: str, mode: type, rule: Callable[..., Any]) -> None:
    """What a dispatch mode does when it meets an operator, instead of its ``__torch_dispatch__``."""
    torch.library.register_torch_dispatch(f"{NAMESPACE}::{name}", mode, rule, lib=_library)


class OPS:
    """The operators' only overloads."""

    forward = torch.ops.triton_brn.forward.default
    statistics = torch.ops.triton_brn.statistics.default
    normalise = torch.ops.triton_brn.normalise.default
    inference = torch.ops.triton_brn.inference.default
    backward = torch.ops.triton_brn.backward.default


def _caller(name: str, implementation: Callable[..., Any], may_be_traced: bool) -> Callable[..., Any]:
    """The operator as the layers call it: for plain tensors that nobody traces, its implementation.

    A trip through torch's dispatcher costs 35 us forward and 25 us backward on the host.
    """
    operator = getattr(OPS, name)

    def call(*args: Any) -> Any:
        x = args[0]
        if x.is_meta or (may_be_traced and is_traced(x)):
            return operator(*args)
        if not _profiler_enabled():
            return implementation(*args)
        with record_function(f"BatchRenorm.{name}"):
            return implementation(*args)

    return call


def is_traced(x: Tensor) -> bool:
    """Whether somebody looks on: a compiler, jit.trace, fx, a subclass of Tensor, a dispatch mode."""
    return (
        type(x) not in checkpointing.PLAIN_TENSORS
        or is_dynamo_compiling()  # other compilers pass tensors of their own
        or bool(_len_torch_dispatch_stack())
        or _is_tracing()
        or (bool(_len_torch_function_stack()) and traces.before_dispatch())
    )


# Of an untraced call.
forward, inference = (_caller(name, _implementations[name], False) for name in ("forward", "inference"))
repeated_forward = _caller("forward", _repeated_forward, True)
backward = _caller("backward", _implementations["backward"], True)
