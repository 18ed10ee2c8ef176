"""torch.func and forward-mode AD: derivatives, one and many at a time, on every backend."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import pytest
import torch
from members import DERIVATIVES, DOUBLE, assert_same, functions, members
from reference import assert_accurate, inputs, lay_out
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jvp, linearize
from torch.utils.checkpoint import checkpoint

from triton_brn import batch_renorm

# Forward-mode AD


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("duals", [d for d in itertools.product((0, 1), repeat=3) if any(d)])
def test_tangents(duals: tuple[int, ...], training: bool, backend: str) -> None:
    """Whichever of x, weight and bias is dual; nothing requires grad."""
    case = inputs((4, 9, 2), DOUBLE)
    values = (case.x, case.weight, case.bias)
    tangents = [torch.randn_like(v) for v in values]
    results = []
    for function in functions(case, training):
        with forward_ad.dual_level():
            args = [
                forward_ad.make_dual(v, t) if dual else v
                for v, t, dual in zip(values, tangents, duals, strict=True)
            ]
            results.append(tuple(forward_ad.unpack_dual(function(*args))))
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((64, 9), "contiguous"),
        ((8, 9, 4, 5), "channels_last"),
        ((8, 9, 5), "gaps"),
        ((8, 9, 2, 2, 2), "permuted"),
    ],
)
def test_tangents_of_every_layout(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, training: bool, backend: str
) -> None:
    case = inputs(shape, dtype, layout)
    tangent = lay_out(torch.randn(shape).to(dtype), layout)
    ours, truth = functions(case, training)
    y, dy = jvp(lambda x: ours(x, case.weight, case.bias), (case.x,), (tangent,))
    expected = jvp(lambda x: truth(x, case.weight, case.bias), (case.x.double(),), (tangent.double(),))
    assert y.dtype == dy.dtype == dtype
    assert y.stride() == torch.empty_like(case.x).stride()
    assert_accurate(y, expected[0])
    assert_accurate(dy, expected[1], scale=expected[1].abs().max())


def test_nothing_is_dual(backend: str) -> None:
    """A level of forward AD alone, maybe another thread's, changes nothing, nor how checkpoints recompute."""
    results = []
    for level in (forward_ad.dual_level, contextlib.nullcontext):
        (layer,) = members(1)
        x = torch.linspace(-1, 2, 15, dtype=DOUBLE).view(5, 3).requires_grad_()
        with level():
            y = layer(x)
            assert forward_ad.unpack_dual(y).tangent is None
            z = checkpoint(layer, x, use_reentrant=False)
            dx = torch.autograd.grad((y + z).pow(3).sum(), x)
        results.append((y, z, dx, *layer.buffers()))
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
def test_forward_over_reverse_by_hand(training: bool, backend: str) -> None:
    """A Hessian-vector product: dual numbers through a backward."""
    case = inputs((5, 9), DOUBLE)
    tangent, results = torch.randn(5, 9, dtype=DOUBLE), []
    for function in functions(case, training):
        x = case.x.clone().requires_grad_()
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(x, tangent), case.weight, case.bias)
            (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
            results.append(tuple(forward_ad.unpack_dual(dx)))
    assert_same(*results)


# torch.func's derivatives


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str, training: bool, backend: str) -> None:
    case = inputs((3, 4, 2), DOUBLE)
    args = (case.x, case.weight, case.bias)
    results = [
        DERIVATIVES[name](lambda *a, f=f: f(*a).pow(3).sum())(*args) for f in functions(case, training)
    ]
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
def test_without_affine(training: bool, backend: str) -> None:
    case = inputs((3, 4, 2), DOUBLE, affine=False)
    results = [hessian(lambda x, f=f: f(x).pow(3).sum())(case.x) for f in functions(case, training)]
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_in_all_its_ways(training: bool, eager: None) -> None:
    case = inputs((3, 3, 2), DOUBLE)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not training:
            return batch_renorm(x, case.running_mean, case.running_var, weight, bias)
        statistics = case.running_mean.clone(), case.running_var.clone()
        return batch_renorm(x, *statistics, weight, bias, training=True, r_max=1.0, d_max=0.0)

    flags = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, leaves, **flags)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


# Many gradients at a time


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("limits", [{}, {"r_max": 3.0, "d_max": 5.0}])
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((5, 3), "contiguous", torch.float32),
        ((3, 3, 2, 2), "channels_last", torch.float32),
        ((3, 3, 2), "contiguous", torch.bfloat16),
    ],
)
def test_gradients_in_batches(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, limits: Any, training: bool, backend: str
) -> None:
    case = inputs(shape, dtype, layout)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    limits = limits or {"r_max": 1.0, "d_max": 0.0}
    y = batch_renorm(*case.args, training=training, **limits)
    dys = torch.stack([case.dy, case.dy.flip(0), torch.ones_like(case.dy)])
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for b, e in zip(batched, zip(*each, strict=True), strict=True):
        assert b.dtype == e[0].dtype
        assert_same(b, torch.stack(e), 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("shape", "layout"), [((4096, 160), "contiguous"), ((8, 5, 64, 64), "channels_last")]
)
def test_gradients_of_large_inputs_in_batches(shape: tuple[int, ...], layout: str, eager: None) -> None:
    """Plain PyTorch has ways of its own for them."""
    case = inputs(shape, layout=layout)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=True)
    dys = torch.stack([case.dy, case.dy.flip(0)])
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for b, e in zip(batched, zip(*each, strict=True), strict=True):
        assert_same(b, torch.stack(e), 3e-6)


def test_gradients_in_batches_that_can_be_differentiated(backend: str) -> None:
    dys, results = torch.randn(2, 5, 3, dtype=DOUBLE), []
    for batched in (True, False):
        (layer,) = members(1)
        x = torch.linspace(-1, 2, 15, dtype=DOUBLE).view(5, 3).pow(2).requires_grad_()
        options: dict[str, Any] = {"is_grads_batched": batched, "create_graph": True}
        y = layer(x)
        dxs = [torch.autograd.grad(y, x, dy, **options)[0] for dy in ([dys] if batched else dys)]
        dx = dxs[0] if batched else torch.stack(dxs)
        results.append((dx, *torch.autograd.grad(dx.pow(3).sum(), [x, layer.weight])))
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(strategy: str, training: bool, backend: str) -> None:
    case = inputs((3, 3, 2), DOUBLE)
    args = (case.x, case.weight, case.bias)
    ours, truth = functions(case, training)
    results = [
        torch.autograd.functional.jacobian(f, args, vectorize=True, strategy=strategy) for f in (ours, truth)
    ]
    assert_same(*results)
    options = {"vectorize": True, "outer_jacobian_strategy": strategy}
    results = [
        torch.autograd.functional.hessian(lambda *a, f=f: f(*a).pow(3).sum(), args, **options)
        for f in (ours, truth)
    ]
    assert_same(*results)


@pytest.mark.parametrize("recomputed", [True, False])
def test_checkpoints_in_forward_mode(recomputed: bool, backend: str) -> None:
    """Tangents go through a checkpoint; what its backward would compute anew is refused."""
    (layer,) = members(1)
    x = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    expected = jvp(copy.deepcopy(layer), (x,), (x,))[1]
    with forward_ad.dual_level():
        y = checkpoint(layer, forward_ad.make_dual(x, x), use_reentrant=False)
        assert_same(forward_ad.unpack_dual(y).tangent, expected)
        if recomputed:
            with pytest.raises(RuntimeError, match=r"recomputed inside .* in forward-mode AD"):
                y.sum().backward()
    if not recomputed:
        with pytest.raises(RuntimeError, match="that its first pass did not call"):
            y.sum().backward()
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("limits", [(1.0, 0.0), (3.0, 5.0)])
def test_the_backward_of_dual_numbers(limits: tuple[float, float], training: bool, backend: str) -> None:
    """The forward was plain: the tangent of a gradient is the gradient of the tangent, for it is linear."""
    case = inputs((4, 3, 2), DOUBLE)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = batch_renorm(*case.args, training=training, r_max=limits[0], d_max=limits[1])
    tangent = torch.randn_like(case.dy)
    expected = torch.autograd.grad(y, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, leaves, forward_ad.make_dual(case.dy, tangent))
        assert_same([forward_ad.unpack_dual(g).tangent for g in grads], expected)


def test_linearize(backend: str) -> None:
    (layer,) = members(1)
    x, tangent = torch.randn(2, 5, 3, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match=r"linearize .* Call eval\(\) first, or use torch.func.jvp"):
        linearize(layer, x)
    layer.eval()
    y, function = linearize(layer, x)
    assert_same((y, function(tangent)), jvp(layer, (x,), (tangent,)))


def test_tangents_in_compiled_code(eager: None) -> None:
    """A level of forward AD inside the compiled function."""
    (layer,), (other,) = members(1), members(1)
    layer.requires_grad_(False)
    other.requires_grad_(False)
    x, tangent = torch.randn(2, 5, 3, dtype=DOUBLE)

    def function(layer: Any) -> Any:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training), other.train(training)
        assert_same(compiled(layer), function(other))
        assert_same(list(layer.buffers()), list(other.buffers()))


def test_what_torch_does_not_promise() -> None:
    """Names that are not public, and what the layers take them for."""
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    assert jvp(lambda x: x * forward_ad._current_level, (torch.ones(()),), (torch.ones(()),))[0] == 0
    assert not torch._C._functorch.is_legacy_batchedtensor(torch.ones(()))
    assert torch._C._functorch.get_interpreter_stack() is None
