"""torch.func and forward-mode AD: derivatives, ensembles, running statistics, on every backend."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_accurate, batch_renorm_reference, inference_reference, inputs, lay_out
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from triton_brn import BatchRenorm1d, Ramp, batch_renorm

DOUBLE = torch.float64


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
    """A level of forward AD alone changes nothing."""
    results = []
    for level in (forward_ad.dual_level, contextlib.nullcontext):
        (layer,) = members(1)
        x = torch.linspace(-1, 2, 15, dtype=DOUBLE).view(5, 3).requires_grad_()
        with level():
            y = layer(x)
            assert forward_ad.unpack_dual(y).tangent is None
        results.append((y, torch.autograd.grad(y.pow(3).sum(), x), *layer.buffers()))
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


# Ensembles


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("in_dim", [None, 0, 1, 2])
def test_stacked_layers(in_dim: int | None, momentum: float | None, training: bool, backend: str) -> None:
    """Each member as by itself: outputs, gradients, statistics, counter; x shared or one for each."""
    layers = [m.train(training) for m in members(momentum=momentum)]
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    xs = torch.randn(4, 5, 3, dtype=DOUBLE)
    xs = xs[0] if in_dim is None else xs.movedim(0, in_dim).contiguous()

    def one(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    y = vmap(one, in_dims=(0, 0, in_dim))(parameters, buffers, xs)
    gradients = torch.autograd.grad(y.pow(3).sum(), list(parameters.values()))
    each = [m(xs if in_dim is None else xs.select(in_dim, i)) for i, m in enumerate(layers)]
    expected = [
        torch.autograd.grad(t.pow(3).sum(), list(m.parameters())) for t, m in zip(each, layers, strict=True)
    ]
    assert_same(y, torch.stack(each))
    assert_same(gradients, [torch.stack(g) for g in zip(*expected, strict=True)])
    assert_same(list(buffers.values()), stacked(layers, buffers))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"randomness": "different"}])
@pytest.mark.parametrize("captured", [True, False])
def test_gradients_of_each_member(captured: bool, options: dict[str, Any], backend: str) -> None:
    """vmap of grad: the statistics come through both, or grad's function captures them."""
    layers, (base,) = members(), members(1)
    parameters, buffers = stack_module_state(layers)
    xs = torch.randn(4, 5, 3, dtype=DOUBLE)

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,)).pow(3).sum()

    def capturing(parameters: Any, buffers: Any, x: Tensor) -> Any:
        return grad(lambda p: loss(p, buffers, x))(parameters)

    gradients = vmap(capturing if captured else grad(loss), **options)(parameters, buffers, xs)
    expected = [
        torch.autograd.grad(m(x).pow(3).sum(), list(m.parameters())) for m, x in zip(layers, xs, strict=True)
    ]
    assert_same(list(gradients.values()), [torch.stack(g) for g in zip(*expected, strict=True)])
    assert_same(list(buffers.values()), stacked(layers, buffers))


def test_gradients_of_each_sample(backend: str) -> None:
    layer = members(1)[0].eval()
    parameters = dict(layer.named_parameters())
    xs = torch.randn(4, 3, dtype=DOUBLE)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).pow(3).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    expected = [torch.autograd.grad(layer(x[None]).pow(3).sum(), list(layer.parameters())) for x in xs]
    assert_same(list(gradients.values()), [torch.stack(g) for g in zip(*expected, strict=True)])


@pytest.mark.parametrize("training", [True, False])
def test_vmap_in_vmap(training: bool, backend: str) -> None:
    """Batches of batches in any place, statistics with gaps, one counter for each."""
    xs = torch.randn(4, 5, 2, 3, dtype=DOUBLE)
    mean, var = torch.randn(3, 2, 4, dtype=DOUBLE), torch.rand(3, 2, 4, dtype=DOUBLE) + 0.5
    step, weight = torch.arange(8).view(2, 4), torch.randn(2, 3, dtype=DOUBLE)
    before = [t.clone() for t in (mean, var, step)]

    def one(x: Tensor, mean: Tensor, var: Tensor, step: Tensor, weight: Tensor) -> Tensor:
        options = {"training": training, "momentum": None, "r_max": Ramp(1, 3, 2, 6)}
        return batch_renorm(x, mean, var, weight, num_batches_tracked=step, **options)

    y = vmap(vmap(one, (0, 1, 1, 0, None)), (2, 1, 1, 0, 0))(xs, mean, var, step, weight)
    for i, j in itertools.product(range(2), range(4)):
        alone = [t.select(t.ndim - 2, i).select(-1, j).clone() for t in before]
        assert_same(y[i, j], one(xs[j, :, i], *alone, weight[i]))
        now = [t.select(t.ndim - 2, i).select(-1, j) for t in (mean, var, step)]
        assert_same(now, alone)


@pytest.mark.parametrize("batched", ["x", "running_var", "x, vmap in vmap"])
def test_shared_statistics_cannot_have_members(batched: str, backend: str) -> None:
    """In training: says what to do, and has changed nothing."""
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 3, dtype=DOUBLE)
    if batched.startswith("x"):
        function = layer if batched == "x" else vmap(layer)
        arguments: tuple[Any, ...] = (torch.randn(*[2] * (1 + ("in" in batched)), 5, 3, dtype=DOUBLE),)
    else:
        arguments = ({batched: torch.rand(2, 3, dtype=DOUBLE)},)

        def function(buffers: Any) -> Tensor:
            return functional_call(layer, buffers, (x,))

    with pytest.raises(ValueError, match=r"running_(mean|var): .*stack_module_state.* or call eval\(\)"):
        vmap(function)(*arguments)
    assert_same(layer.state_dict(), before, 0)
    layer.eval()
    assert vmap(function)(*arguments).isfinite().all()


def test_members_that_share_x_and_statistics(backend: str) -> None:
    """Weights alone are batched: one batch was seen."""
    (layer,), (other,) = members(1), members(1)
    x, weights = torch.randn(5, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    y = vmap(lambda w: functional_call(layer, {"weight": w}, (x,)))(weights)
    expected = (other(x) - other.bias) / other.weight
    assert_same(y, expected * weights[:, None] + other.bias)
    assert_same(list(layer.buffers()), list(other.buffers()))


# Running statistics


@pytest.mark.parametrize(
    "name", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "forward over forward"]
)
@pytest.mark.parametrize("captured", [True, False])
def test_statistics_are_updated_once(captured: bool, name: str, backend: str) -> None:
    """In place, by constants, whether the differentiated function captures them or takes them."""
    (layer,), (other,) = members(1), members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    buffers = dict(layer.named_buffers())

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = layer(x) if captured else functional_call(layer, buffers, (x,))
        return (y * weight + bias).pow(3).sum()

    DERIVATIVES[name](loss)(x, layer.weight.detach().clone(), layer.bias.detach().clone())
    other(x)
    assert_same(list(layer.buffers()), list(other.buffers()))
    assert layer.num_batches_tracked == other.num_batches_tracked
    for b in layer.buffers():
        assert type(b) is Tensor
        assert not b.requires_grad
        assert any(b is v for v in state.values())


def test_statistics_passed_through_transforms(backend: str) -> None:
    """As arguments of a function that is differentiated twice, and of one with tangents."""
    x = torch.randn(5, 3, dtype=DOUBLE)
    (expected,) = members(1)
    expected(x)
    (layer,) = members(1)

    def loss(x: Tensor, buffers: Any) -> Tensor:
        return functional_call(layer, buffers, (x,)).pow(3).sum()

    for transform in (grad(lambda x, b: grad(loss)(x, b).pow(2).sum()), hessian(loss)):
        buffers = {n: b.clone() for n, b in layer.named_buffers()}
        transform(x, buffers)
        assert_same(list(buffers.values()), list(expected.buffers()))


def test_what_is_dual_leaves_no_tangent_in_the_statistics(backend: str) -> None:
    (layer,) = members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
        assert all(
            forward_ad.unpack_dual(b).tangent is None for b in layer.buffers() if b.is_floating_point()
        )
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_exact(dtype: torch.dtype, momentum: float | None, average: str, eager: None) -> None:
    """Far channels, bad ones, constant ones; momentum=0 leaves every bit."""
    case = inputs((64, 9, 3), dtype)
    case.x[:, 1] = case.x[:, 1] * 1e-2 + (1e4 if dtype == torch.float32 else 0.5)
    case.x[3, 2, 1], case.x[5, 4, 0], case.x[:, 5] = float("nan"), float("inf"), 0.1
    before = case.running_mean.clone(), case.running_var.clone()
    options = {"momentum": momentum, "running_average": average}
    truth = batch_renorm_reference(*case.args, momentum=momentum, average=average, step=3)
    y = vmap(lambda *a: batch_renorm(*a[:5], training=True, num_batches_tracked=a[5], **options))(
        *(t[None] for t in (*case.args, torch.tensor(3)))
    )
    assert_accurate(y[0], truth.y)
    if momentum == 0:
        assert torch.equal(case.running_mean, before[0])
        assert torch.equal(case.running_var, before[1])
    assert_accurate(case.running_mean, truth.running_mean, scale=truth.running_mean.abs() + 1)
    assert_accurate(case.running_var, truth.running_var)


def test_bad_input_is_refused_first(backend: str) -> None:
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="input: expected more than 1 value per channel"):
        vmap(layer)(torch.randn(4, 1, 3, dtype=DOUBLE))
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        grad(lambda x: functional_call(layer, {"running_mean": torch.zeros(2)}, (x,)).sum())(
            torch.randn(5, 3)
        )
    with pytest.raises(ValueError, match=r"running_mean: expected .* does not require grad"):
        grad(lambda m: functional_call(layer, {"running_mean": m}, (torch.ones(5, 3, dtype=DOUBLE),)).sum())(
            torch.zeros(3, dtype=DOUBLE)
        )
    assert_same(layer.state_dict(), before, 0)


def test_an_empty_batch(backend: str) -> None:
    (layer,) = members(1)
    before = copy.deepcopy(layer.state_dict())
    dx, dweight = grad(lambda x, w: functional_call(layer, {"weight": w}, (x,)).sum(), (0, 1))(
        torch.empty(0, 3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    )
    assert dx.shape == (0, 3)
    assert torch.equal(dweight, torch.zeros(3, dtype=DOUBLE))
    assert_same(layer.state_dict(), before, 0)


def test_functionalize(backend: str) -> None:
    (layer,), (other,) = members(1), members(1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    buffers = {n: b.clone() for n, b in layer.named_buffers()}
    y = functionalize(lambda x, b: functional_call(layer, b, (x,)))(x, buffers)
    assert_same(y, other(x))
    assert_same(list(buffers.values()), list(other.buffers()))


# Many gradients at a time


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("limits", [{}, {"r_max": 3.0, "d_max": 5.0}])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 9), "contiguous"), ((3, 9, 2, 2), "channels_last"), ((3, 9, 2, 2), "contiguous")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_batches(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, limits: Any, training: bool, backend: str
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
        with pytest.raises(RuntimeError, match="none that the first pass made"):
            y.sum().backward()
    assert layer.num_batches_tracked == 2
