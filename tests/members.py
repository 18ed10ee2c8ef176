"""What the tests of torch.func share: layers that differ, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference import batch_renorm_reference, inference_reference
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils import _pytree as pytree

from triton_brn import BatchRenorm1d, Ramp, batch_renorm

DOUBLE = torch.float64

#: Of a function of three tensors.
DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "vjp": lambda f: lambda *args: vjp(f, *args)[1](torch.ones((), dtype=DOUBLE)),
    "jvp": lambda f: lambda *args: jvp(f, args, args),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacrev in chunks": lambda f: jacrev(f, (0, 1, 2), chunk_size=2),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(f, (0, 1, 2)),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 1, 2)), (0, 1, 2)),
    "forward over forward": lambda f: jacfwd(jacfwd(f, (0, 1, 2)), (0, 1, 2)),
    "third, reverse": lambda f: jacrev(jacrev(jacrev(f))),
    "third, mixed": lambda f: jacfwd(jacrev(jacfwd(f))),
}


def functions(case: Any, training: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and the reference, of x, weight and bias; the statistics stay as they are."""
    statistics = case.running_mean, case.running_var

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_renorm(x, *(s.clone() for s in statistics), weight, bias, training=training)

    def truth(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if training:
            return batch_renorm_reference(x, *statistics, weight, bias).y
        return inference_reference(x, *statistics, weight, bias)

    return ours, truth


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Trees of tensors, each within ``tolerance`` of the largest value of all."""
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    size = max(float(e.detach().abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a.detach().double() - e.detach().double()).abs().max()) <= tolerance * size


def members(count: int = 4, **options: Any) -> list[BatchRenorm1d]:
    """Layers that differ in all they hold; their limits are on the way."""
    options = {"r_max": Ramp(1, 3, 0, 8), "d_max": Ramp(0, 5, 0, 8), "momentum": 0.1, **options}
    layers = [BatchRenorm1d(3, dtype=DOUBLE, **options) for _ in range(count)]
    g = torch.Generator().manual_seed(1)
    for i, layer in enumerate(layers):
        with torch.no_grad():
            for t in (layer.weight, layer.bias, layer.running_mean):
                t.copy_(torch.randn(3, generator=g, dtype=DOUBLE))
            layer.running_var.copy_(torch.rand(3, generator=g, dtype=DOUBLE) + 0.5)
            layer.num_batches_tracked.fill_(i + 1)
    return layers


def stacked(layers: list[Any], names: Any) -> list[Tensor]:
    states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in layers]
    return [torch.stack([s[n] for s in states]) for n in names]
