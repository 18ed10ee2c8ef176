"""vmap over stacked layers, on every backend."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from members import DOUBLE, assert_same, members, stacked
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    stack_module_state,
    vmap,
)
from torch.utils.checkpoint import checkpoint

from triton_brn import BatchRenorm1d, Ramp, batch_renorm


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


@pytest.mark.parametrize("frozen", ["momentum", "track_running_stats"])
def test_shared_statistics_that_stay_as_they_are(frozen: str, backend: str) -> None:
    """Each sample of a batch by itself, in training: nothing is to be written but the counter."""
    (layer,), (other,) = members(1), members(1)
    for m in (layer, other):
        setattr(m, frozen, 0)
    xs = torch.randn(4, 5, 3, dtype=DOUBLE)
    before = copy.deepcopy(layer.state_dict())
    y, counted = vmap(layer)(xs), frozen == "momentum"
    each = []
    for x in xs:  # the counter, which the limits follow, stands for all of them where the first one stood
        other.load_state_dict(before)
        each.append(other(x))
    assert_same(y, torch.stack(each))
    assert torch.equal(layer.running_mean, before["running_mean"])
    assert torch.equal(layer.running_var, before["running_var"])
    assert layer.num_batches_tracked == before["num_batches_tracked"] + counted


def test_members_that_share_x_and_statistics(backend: str) -> None:
    """Weights alone are batched: one batch was seen."""
    (layer,), (other,) = members(1), members(1)
    x, weights = torch.randn(5, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    y = vmap(lambda w: functional_call(layer, {"weight": w}, (x,)))(weights)
    expected = (other(x) - other.bias) / other.weight
    assert_same(y, expected * weights[:, None] + other.bias)
    assert_same(list(layer.buffers()), list(other.buffers()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_around_an_ensemble(use_reentrant: bool, backend: str) -> None:
    """In training the second pass is refused before it changes anything; in eval there is nothing to keep."""
    parameters, buffers = stack_module_state(members())
    (base,) = members(1)
    xs = torch.randn(4, 5, 3, dtype=DOUBLE, requires_grad=True)

    def ensemble(xs: Tensor) -> Tensor:
        return vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, xs)

    y = checkpoint(ensemble, xs, use_reentrant=use_reentrant)
    before = copy.deepcopy(buffers)
    with pytest.raises(RuntimeError, match=r"recomputed inside .* in torch\.func"):
        y.sum().backward()
    assert_same(buffers, before, 0)
    base.eval()
    checkpoint(ensemble, xs, use_reentrant=use_reentrant).pow(3).sum().backward()
    assert_same(xs.grad, torch.autograd.grad(ensemble(xs).pow(3).sum(), xs)[0])


def test_vmap_of_a_backward_that_recomputes(backend: str) -> None:
    (layer,) = members(1)
    x = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"recomputed inside .* in torch\.func"):
        vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True))(torch.randn(4, 5, 3, dtype=DOUBLE))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 5, 0), (2, 5, 0, 4)])
def test_nothing_in_vmap(shape: tuple[int, ...], backend: str) -> None:
    mean, var = torch.zeros(shape[2]), torch.ones(shape[2])
    for training in (True, False):
        y = vmap(lambda x, training=training: batch_renorm(x, mean, var, training=training))(
            torch.empty(shape)
        )
        assert y.shape == shape


def test_half_precision_under_autocast(backend: str) -> None:
    """y in the input's dtype; statistics and weights stay float32."""
    layers = [BatchRenorm1d(3, r_max=3.0, d_max=5.0) for _ in range(2)]
    parameters, buffers = stack_module_state(layers)
    xs = torch.randn(2, 64, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, buffers, xs)
        each = torch.stack([layer(x) for layer, x in zip(layers, xs, strict=True)])
    assert y.dtype == torch.bfloat16
    assert_same(y, each, 2**-8)
    assert_same(list(buffers.values()), stacked(layers, buffers), 1e-6)
