"""torch.func inside torch.compile(fullgraph=True): as outside of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from members import DOUBLE, assert_same, members
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.usefixtures("eager")


def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
    (layer,) = LAYERS
    return functional_call(layer, (parameters, buffers), (x,)).pow(3).sum()


def output(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
    (layer,) = LAYERS
    return functional_call(layer, (parameters, buffers), (x,))


LAYERS = members(1)
STACKED = {"vmap": lambda: vmap(output), "gradients of each member": lambda: vmap(grad(loss))}
SINGLE = {
    "grad": lambda: grad(loss),
    "jacrev": lambda: jacrev(loss),
    "hessian": lambda: hessian(loss),
    "jvp": lambda: lambda p, b, x: jvp(lambda x: loss(p, b, x), (x,), (x,)),
}


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in (*STACKED, *SINGLE) if name != "jvp"] + [("vmap", False), ("jvp", False)],
)
def test_compiled(name: str, training: bool) -> None:
    """Also the gradients that autograd makes of the result, and the statistics."""
    LAYERS[0].train(training)
    layers = members() if name in STACKED else members(1)
    x = torch.randn(4, 5, 3, dtype=DOUBLE)
    results = []
    for compiled in (False, True):
        parameters, buffers = stack_module_state(copy.deepcopy(layers))
        if name in SINGLE:
            parameters, buffers = (
                {n: t.detach()[0].clone().requires_grad_(t.requires_grad) for n, t in d.items()}
                for d in (parameters, buffers)
            )
        function = (STACKED | SINGLE)[name]()
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = pytree.tree_leaves(function(parameters, buffers, x if name in STACKED else x[0]))
        total = sum(t.pow(2).sum() for t in found)
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        results.append((found, [g for g in grads if g is not None], list(buffers.values())))
    assert_same(results[1], results[0])


def test_statistics_that_are_captured() -> None:
    """The compiler sees operations alone: torch's own error, which says what to do; nothing has changed."""
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    torch._dynamo.reset()
    function: Callable[..., Any] = torch.compile(
        grad(lambda x: layer(x).pow(3).sum()), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="explicitly accept the mutated Tensor"):
        function(torch.randn(5, 3, dtype=DOUBLE))
    assert_same(layer.state_dict(), before, 0)
    expected = grad(lambda x: layer(x).pow(3).sum())(torch.ones(5, 3, dtype=DOUBLE))
    assert expected.isfinite().all()
    layer.eval()
    x = torch.randn(5, 3, dtype=DOUBLE)
    assert_same(function(x), grad(lambda x: layer(x).pow(3).sum())(x))
