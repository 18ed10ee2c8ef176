"""The layers: their API, state, dtypes, and that they compute Algorithm 1."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    from_case,
    inference_reference,
    inputs,
    reference_gradients,
    sum_scales,
)
from torch import nn

import triton_brn
from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, batch_renorm

PAIRS = [
    (BatchRenorm1d, nn.BatchNorm1d, (8, 3)),
    (BatchRenorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (BatchRenorm2d, nn.BatchNorm2d, (4, 3, 2, 3)),
    (BatchRenorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]
LAYERS = [BatchRenorm1d, BatchRenorm2d, BatchRenorm3d]
KINDS = {"params": inspect.Parameter.POSITIONAL_OR_KEYWORD, "options": inspect.Parameter.KEYWORD_ONLY}


def parameters_of(signature: inspect.Signature) -> list[tuple[str, str, Any]]:
    kinds = {kind: name for name, kind in KINDS.items()}
    return [(p.name, kinds[p.kind], p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layers_signature(layer: type) -> None:
    assert parameters_of(inspect.signature(layer)) == [
        ("num_features", "params", inspect.Parameter.empty),
        ("eps", "params", 1e-5),
        ("momentum", "params", 0.01),
        ("affine", "params", True),
        ("track_running_stats", "params", True),
        ("device", "params", None),
        ("dtype", "params", None),
        ("bias", "options", True),
        ("r_max", "options", Ramp(1.0, 3.0, begin=5_000, end=40_000)),
        ("d_max", "options", Ramp(0.0, 5.0, begin=5_000, end=25_000)),
        ("running_average", "options", "std"),
    ]


def test_the_functions_signature() -> None:
    required = inspect.Parameter.empty
    assert parameters_of(inspect.signature(batch_renorm)) == [
        ("input", "params", required),
        ("running_mean", "params", required),
        ("running_var", "params", required),
        ("weight", "params", None),
        ("bias", "params", None),
        ("training", "options", False),
        ("momentum", "options", 0.01),
        ("eps", "options", 1e-5),
        ("r_max", "options", 3.0),
        ("d_max", "options", 5.0),
        ("num_batches_tracked", "options", None),
        ("running_average", "options", "std"),
    ]


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize(("renorm", "_norm", "shape"), PAIRS)
def test_training_is_algorithm_1(
    renorm: type, _norm: type, shape: tuple, average: str, backend: str, device
) -> None:
    case = inputs(shape, device=device)
    layer = from_case(renorm(3, r_max=3.0, d_max=5.0, momentum=0.1, running_average=average), case)
    x = case.x.clone().requires_grad_()
    y = layer(x)
    y.backward(case.dy)

    expected = batch_renorm_reference(*case.args, momentum=0.1, average=average)
    dx, dweight, dbias = reference_gradients(case.dy, *case.args)
    w_scale, b_scale = sum_scales(case.dy, case.x, case.running_mean, case.running_var)
    assert_accurate(y, expected.y)
    assert_accurate(layer.running_mean, expected.running_mean)
    assert_accurate(layer.running_var, expected.running_var)
    assert_accurate(x.grad, dx)
    assert_accurate(layer.weight.grad, dweight, scale=w_scale)
    assert_accurate(layer.bias.grad, dbias, scale=b_scale)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize(("renorm", "_norm", "shape"), PAIRS)
def test_inference_uses_the_running_statistics(
    renorm: type, _norm: type, shape: tuple, backend: str, device
) -> None:
    case = inputs(shape, device=device)
    layer = from_case(renorm(3), case).eval()
    before = copy.deepcopy(layer.state_dict())
    x = case.x.clone().requires_grad_()
    y = layer(x)
    y.backward(case.dy)

    dx, dweight, dbias = reference_gradients(case.dy, *case.args, training=False)
    w_scale, b_scale = sum_scales(case.dy, case.x, case.running_mean, case.running_var, training=False)
    assert_accurate(y, inference_reference(*case.args))
    assert torch.equal(y, layer(case.x)), "with and without gradients"
    assert_accurate(x.grad, dx)
    assert_accurate(layer.weight.grad, dweight, scale=w_scale)
    assert_accurate(layer.bias.grad, dbias, scale=b_scale)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_without_affine_and_with_frozen_parameters(backend: str, device) -> None:
    case = inputs((8, 3), affine=False, device=device)
    layer = BatchRenorm1d(3, affine=False, r_max=3.0, d_max=5.0).to(device)
    layer.running_mean.copy_(case.running_mean)
    layer.running_var.copy_(case.running_var)
    assert layer.weight is None
    assert layer.bias is None
    assert list(layer.parameters()) == []
    x = case.x.clone().requires_grad_()
    layer(x).backward(case.dy)
    assert_accurate(x.grad, reference_gradients(case.dy, *case.args)[0])

    frozen = BatchRenorm1d(3).to(device).requires_grad_(False)
    assert not frozen(case.x).requires_grad
    y = frozen(x.detach().requires_grad_())
    y.backward(case.dy)
    assert frozen.weight.grad is None


def test_without_gradients_training_still_updates(backend: str, device) -> None:
    case = inputs((8, 3), device=device)
    with_grad, without = (from_case(BatchRenorm1d(3, r_max=3.0, d_max=5.0), case) for _ in range(2))
    y = with_grad(case.x)
    with torch.no_grad():
        y_without = without(case.x)
    assert y.requires_grad
    assert not y_without.requires_grad
    assert torch.equal(y, y_without)
    assert all(torch.equal(a, b) for a, b in zip(with_grad.buffers(), without.buffers(), strict=True))


@pytest.mark.parametrize(("renorm", "norm", "shape"), PAIRS)
def test_state_dicts_go_both_ways(renorm: type, norm: type, shape: tuple, eager: None) -> None:
    old = norm(3)
    old(torch.randn(shape) * 2 + 1)
    nn.init.normal_(old.weight)
    new = renorm(3)
    new.load_state_dict(old.state_dict(), strict=True)
    x = torch.randn(shape)
    torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=0, atol=1e-6)
    assert list(new.state_dict()) == list(old.state_dict())
    assert new.num_batches_tracked.item() == 1

    new.train()(x)
    back = norm(3)
    back.load_state_dict(new.state_dict(), strict=True)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in new.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_older_than_the_counter_loads(assign: bool) -> None:
    state = BatchRenorm1d(3).state_dict()
    del state["num_batches_tracked"]
    del state._metadata
    model = nn.Sequential(BatchRenorm1d(3, device="meta" if assign else None))
    model.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    assert model[0].num_batches_tracked.item() == 0

    state = BatchRenorm1d(3).state_dict()  # of our own version: a missing counter is an error
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        BatchRenorm1d(3).load_state_dict(state)


def dtypes(layer: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    assert layer.weight.dtype == layer.bias.dtype
    assert layer.running_mean.dtype == layer.running_var.dtype
    assert layer.num_batches_tracked.dtype == torch.int64
    return layer.weight.dtype, layer.running_mean.dtype


def test_dtype_changes_keep_float32() -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    layer = BatchRenorm2d(3)
    layer.running_mean.fill_(1e-9)  # float16 has no such number
    kept = layer.running_mean.clone()
    for lower in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(f16),
        lambda m: m.to("cpu", bf16),
    ):
        assert dtypes(lower(layer)) == (f32, f32)
    assert torch.equal(layer.running_mean, kept)
    assert dtypes(layer.double()) == (f64, f64)
    assert dtypes(layer.half()) == (f32, f32)
    assert dtypes(layer.double().float()) == (f32, f32)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchRenorm2d(3)).half()
    assert model[0].weight.dtype == f16
    assert dtypes(model[1]) == (f32, f32)

    assert dtypes(BatchRenorm2d(3, dtype=f16)) == (f16, f32)
    assert dtypes(BatchRenorm2d(3, dtype=f64)) == (f64, f64)
    moved = BatchRenorm2d(3).to("meta", f16)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert dtypes(moved) == (f32, f32)
    assert dtypes(moved.to_empty(device="cpu")) == (f32, f32)


def test_the_default_dtype_is_followed() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = BatchRenorm1d(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes(layer) == (torch.float64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_input_dtypes(dtype: torch.dtype, backend: str, device) -> None:
    case = inputs((8, 3, 5), dtype, device=device)
    layer = from_case(BatchRenorm1d(3, r_max=3.0, d_max=5.0).to(dtype), case)
    y = layer(case.x)
    expected = batch_renorm_reference(*case.args)
    assert y.dtype == dtype
    assert_accurate(y, expected.y)
    assert_accurate(layer.running_var, expected.running_var)


def test_meta_tensors_take_the_layer(eager: None) -> None:
    layer = BatchRenorm2d(3, device="meta")
    x = torch.empty(4, 3, 5, 5, device="meta", memory_format=torch.channels_last, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    assert x.grad.stride() == x.stride()
    assert layer.eval()(x).stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "permuted", "offset"])
def test_outputs_keep_the_memory_format(layout: str, backend: str, device) -> None:
    case = inputs((2, 3, 4, 5), layout=layout, device=device)
    dense = inputs((2, 3, 4, 5), device=device)
    for training in (True, False):
        layer, plain = (
            from_case(BatchRenorm2d(3, r_max=3.0, d_max=5.0), case).train(training) for _ in range(2)
        )
        x, z = case.x.detach().requires_grad_(), dense.x.clone().requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, case.dy)
        y_dense = plain(z)
        (dz,) = torch.autograd.grad(y_dense, z, dense.dy)
        assert y.stride() == dx.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(y, y_dense, rtol=0, atol=2e-6)
        torch.testing.assert_close(dx, dz, rtol=0, atol=5e-6)
        torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-6, atol=0)


def test_parameters_need_not_be_contiguous(backend: str, device) -> None:
    case = inputs((8, 3), device=device)
    weight, bias = (torch.stack((v, v * float("nan")), -1)[:, 0] for v in (case.weight, case.bias))
    step = torch.zeros(1, dtype=torch.int64, device=device)
    statistics = case.running_mean.clone(), case.running_var.clone()
    y = batch_renorm(case.x, *statistics, weight, bias, training=True, num_batches_tracked=step)
    assert_accurate(y, batch_renorm_reference(*case.args).y)
    assert step.tolist() == [1]
    y = batch_renorm(case.x, *statistics, weight, bias)
    assert_accurate(y, inference_reference(case.x, *statistics, case.weight, case.bias))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_behave_the_same(clone: Any, eager: None) -> None:
    layer = BatchRenorm1d(
        3, eps=1e-3, momentum=None, r_max=Ramp(1.0, 2.0, begin=0, end=4), running_average="var"
    )
    layer(torch.randn(8, 3))
    twin = clone(layer)
    assert repr(twin) == repr(layer)
    assert twin.running_mean.data_ptr() != layer.running_mean.data_ptr()
    x = torch.randn(8, 3) * 4
    assert torch.equal(twin(x), layer(x))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in layer.state_dict().items())


def test_functional_call_updates_what_it_was_given(eager: None) -> None:
    layer, other = BatchRenorm1d(3, r_max=3.0), BatchRenorm1d(3, r_max=3.0)
    before = copy.deepcopy(layer.state_dict())
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    state["weight"] = state["weight"].mul_(2).requires_grad_()
    x = torch.randn(8, 3) * 2
    y = torch.func.functional_call(layer, state, (x,))
    assert torch.equal(y, other(x) * 2)
    y.sum().backward()
    assert state["weight"].grad is not None
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(state["running_var"], other.running_var)
    assert state["num_batches_tracked"].item() == 1


@pytest.mark.parametrize("average", ["std", "var"])
def test_momentum_none_is_the_cumulative_average(average: str, backend: str, device) -> None:
    layer = BatchRenorm1d(3, momentum=None, running_average=average).to(device)
    batches = [torch.randn(6, 3, device=device) * scale + scale for scale in (1, 2, 3)]
    for x in batches:
        layer(x)
    means = torch.stack([x.double().mean(0) for x in batches])
    variances = torch.stack([x.double().var(0, correction=int(average == "var")) for x in batches])
    var = (variances + 1e-5).sqrt().mean(0) ** 2 - 1e-5 if average == "std" else variances.mean(0)
    assert_accurate(layer.running_mean, means.mean(0), scale=means.abs().max())
    assert_accurate(layer.running_var, var)
    assert layer.num_batches_tracked.item() == 3


def test_repr_says_everything() -> None:
    layer = BatchRenorm2d(7, 1e-3, None, False, r_max=2.0, d_max=None, running_average="var")
    assert repr(layer) == (
        "BatchRenorm2d(7, eps=0.001, momentum=None, affine=False, bias=False, "
        "r_max=2.0, d_max=None, running_average='var')"
    )
    default = BatchRenorm1d(3)
    assert repr(eval(repr(default), vars(triton_brn))) == repr(default)


def test_reset(eager: None) -> None:
    layer, fresh = BatchRenorm1d(3), BatchRenorm1d(3)
    layer(torch.randn(8, 3) + 1)
    nn.init.normal_(layer.weight)
    layer.reset_running_stats()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fresh.buffers(), strict=True))
    assert not torch.equal(layer.weight, fresh.weight)
    layer.reset_parameters()
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("average", ["std", "var"])
def test_a_variance_beyond_float32_leaves_its_channels_statistics(average: str, eager: None, device) -> None:
    """As a NaN or inf does, though each value is finite."""
    layer = BatchRenorm1d(3, running_average=average).to(device)
    x = torch.randn(8, 3, device=device)
    x[0, 1] = 1e30
    layer(x)
    assert layer.running_mean[1] == 0
    assert layer.running_var[1] == 1
    assert (layer.running_mean[::2] != 0).all()
    assert (layer.running_var[::2] != 1).all()


@pytest.mark.parametrize("kind", ["attribute", "parameter", "parametrized"])
def test_statistics_need_not_be_buffers(kind: str, backend: str, device) -> None:
    layer, plain = (BatchRenorm1d(3, r_max=3.0, d_max=5.0).to(device) for _ in range(2))
    mean = layer.running_mean
    if kind == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "running_mean", nn.Identity())
    else:
        del layer.running_mean
        layer.running_mean = mean if kind == "attribute" else nn.Parameter(mean, requires_grad=False)
    x = torch.randn(8, 3, device=device)
    assert torch.equal(layer(x), plain(x))
