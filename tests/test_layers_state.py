"""The layers' state: what casts, loads and copies leave of it, and numbers that are numpy's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, Limit, Ramp, batch_renorm

f16, bf16, f32, f64, i64 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64
STATISTICS = ("running_mean", "running_var")


@pytest.fixture(params=[False, True], ids=["data", "swapped"])
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    """torch's two ways to convert and load: by .data, and by swapping tensors."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


def dtypes(layer: nn.Module) -> list[torch.dtype]:
    return [t.dtype for t in layer.state_dict().values()]


CASTS: list[tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = [
    (lambda m: m.type(f64), f64),
    (lambda m: m.type("torch.DoubleTensor"), f64),
    (lambda m: m.double(), f64),
    (lambda m: m.to(f64), f64),
    (lambda m: m.to(torch.zeros(1, dtype=f64)), f64),
    (lambda m: m.type(f32), f32),
    (lambda m: m.double().type(f32), f32),
    (lambda m: m.double().float(), f32),
    (lambda m: m.type(f16), f32),
    (lambda m: m.type("torch.HalfTensor"), f32),
    (lambda m: m.half(), f32),
    (lambda m: m.to(bf16), f32),
    (lambda m: m.double().half(), f32),
    (lambda m: m.half().double().type(bf16), f32),
]


@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_casts_leave_what_a_forward_takes(
    cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, swapping: bool, eager: None
) -> None:
    model = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3, affine=False), BatchRenorm1d(3, bias=False))
    model[0].num_batches_tracked.fill_(2**53 + 1)  # float64 has no such number
    model = cast(model)
    for layer in model:
        assert dtypes(layer) == [dtype] * (len(layer.state_dict()) - 1) + [i64]
    assert model[0].num_batches_tracked.item() == 2**53 + 1
    model.train()(torch.randn(6, 3, dtype=dtype))
    model.eval()(torch.randn(6, 3, dtype=dtype))


def entries(layer: nn.Module, dtype: torch.dtype, counter: torch.dtype = i64) -> dict[str, Tensor]:
    return {k: v.to(counter if v.dtype == i64 else dtype) for k, v in layer.state_dict().items()}


def seen() -> BatchRenorm1d:
    layer = BatchRenorm1d(3)
    for _ in range(7):
        layer(torch.randn(6, 3))
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("counter", [i64, f32, f64, torch.int32])
@pytest.mark.parametrize("dtype", [f16, bf16, f32, f64])
def test_entries_of_other_dtypes_load(
    dtype: torch.dtype, counter: torch.dtype, assign: bool, swapping: bool, eager: None
) -> None:
    state = entries(seen(), dtype, counter)
    kept = {k: v.clone() for k, v in state.items()}
    model = nn.ModuleDict({"norm": BatchRenorm1d(3)})
    given = {f"norm.{k}": v for k, v in state.items()}
    model.load_state_dict(given, assign=assign)
    layer = model["norm"]
    wanted = f64 if assign and dtype == f64 else f32
    assert dtypes(layer) == [wanted] * 4 + [i64]
    assert layer.num_batches_tracked.item() == 7
    assert all(torch.equal(v, kept[k].to(v.dtype)) for k, v in layer.state_dict().items())
    assert all(given[f"norm.{k}"].dtype == v.dtype for k, v in kept.items()), "the caller's dict"
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    layer(torch.randn(6, 3, dtype=wanted)).sum().backward()
    assert all(torch.equal(state[k], v) for k, v in kept.items() if v.dtype != layer.state_dict()[k].dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [f16, f32, f64])
def test_a_layer_on_meta_takes_what_is_assigned(dtype: torch.dtype, affine: bool, eager: None) -> None:
    state = entries(BatchRenorm1d(3, affine=affine), dtype, f32)
    with torch.device("meta"):
        layer = BatchRenorm1d(3, affine=affine)
    layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    assert {t.device.type for t in layer.state_dict().values()} == {"cpu"}
    wanted = f64 if dtype == f64 else f32
    assert set(dtypes(layer)) == {wanted, i64}
    assert layer(torch.randn(6, 3, dtype=wanted)).dtype == wanted

    emptied = BatchRenorm1d(3, affine=affine, device="meta").to_empty(device="cpu")
    emptied.reset_parameters()
    emptied.load_state_dict(state)
    assert set(dtypes(emptied)) == {f32, i64}
    assert torch.equal(emptied.running_var, torch.ones(3))
    assert emptied.num_batches_tracked.item() == 0


def test_weights_that_are_half_already_stay_so(eager: None) -> None:
    layer = BatchRenorm2d(3, dtype=f16)
    layer.load_state_dict(entries(layer, f16), assign=True)
    assert dtypes(layer) == [f16, f16, f32, f32, i64]
    assert layer(torch.randn(2, 3, 4, 4, dtype=f16)).dtype == f16


def test_what_fits_is_assigned_as_it_is() -> None:
    state = {k: v.clone() for k, v in BatchRenorm1d(3).state_dict().items()}
    state["weight"] = nn.Parameter(state["weight"], requires_grad=False)
    layer = BatchRenorm1d(3)
    layer.load_state_dict(state, assign=True)
    assert layer.weight is state["weight"]
    assert layer.running_mean is state["running_mean"]
    assert layer.num_batches_tracked is state["num_batches_tracked"]


def test_entries_that_are_absent_or_unknown_are_still_said() -> None:
    state = entries(BatchRenorm1d(3), f16)
    del state["running_mean"]
    state["more"] = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*running_mean.*Unexpected.*more"):
        BatchRenorm1d(3).load_state_dict(state, assign=True)
    loaded = BatchRenorm1d(3)
    loaded.load_state_dict(state, assign=True, strict=False)
    assert dtypes(loaded) == [f32] * 4 + [i64]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d])
def test_a_checkpoint_older_than_the_counter_loads(norm: type, assign: bool, eager: None) -> None:
    state = entries(norm(3), f16 if assign else f32)
    del state["num_batches_tracked"]
    layer = BatchRenorm1d(3, device="meta" if assign else None)
    layer.load_state_dict(state, assign=assign)
    assert layer.num_batches_tracked.item() == 0
    assert layer.num_batches_tracked.device.type == "cpu"
    layer(torch.randn(6, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_copies_have_the_whole_state(tracking: bool, bias: bool, eager: None) -> None:
    layer = BatchRenorm1d(3, momentum=None, bias=bias, r_max=2.0, d_max=None)
    layer.track_running_stats = tracking
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert repr(twin) == repr(layer)
        assert twin.track_running_stats is tracking
    twin = pickle.loads(pickle.dumps(layer))
    for _ in range(2):
        x = torch.randn(6, 3)
        assert torch.equal(layer(x), twin(x))


NUMPY: list[Callable[[float], Any]] = [np.float32, np.float64, np.float16]


@pytest.mark.parametrize("number", NUMPY)
def test_numpy_numbers_are_numbers(number: Callable[[float], Any], backend: str, device) -> None:
    given: dict[str, Any] = {
        "momentum": number(0.25),
        "eps": number(0.5),
        "r_max": number(2),
        "d_max": number(1),
    }
    plain: dict[str, Any] = {"momentum": 0.25, "eps": 0.5, "r_max": 2.0, "d_max": 1.0}
    layers = [BatchRenorm1d(np.int64(3), **given), BatchRenorm1d(3, **plain)]
    assert repr(layers[0]) == repr(layers[1])
    x = torch.randn(6, 3, device=device) * 3 + 1
    y, expected = (layer.to(device)(x) for layer in layers)
    assert torch.equal(y, expected)
    assert torch.equal(layers[0].running_var, layers[1].running_var)
    later = BatchRenorm1d(3).to(device)
    for name, value in given.items():
        setattr(later, name, value)
    assert torch.equal(later(x), expected)
    arguments = (x, torch.zeros(3, device=device), torch.ones(3, device=device))
    assert torch.equal(batch_renorm(*arguments, training=True, **given), y)


def test_numpy_integers_are_numbers(eager: None) -> None:
    layer = BatchRenorm1d(np.int32(3), momentum=np.int64(1), r_max=np.int8(2), d_max=np.uint8(0))
    assert (layer.num_features, layer.momentum, layer.r_max, layer.d_max) == (3, 1, 2, 0)
    assert {type(v) for v in (layer.num_features, layer.momentum, layer.r_max)} == {int}
    layer(torch.randn(6, 3))


def test_numpy_numbers_in_ramps() -> None:
    ramp = Ramp(np.float32(1), np.float64(3), begin=np.int64(2), end=np.uint16(4))
    assert ramp == Ramp(1.0, 3.0, begin=2, end=4)
    assert repr(ramp) == repr(Ramp(1.0, 3.0, begin=2, end=4))
    assert hash(ramp) == hash(Ramp(1.0, 3.0, 2, 4))
    for name in ("start", "stop", "begin", "end"):
        fields: dict[str, Any] = {"start": 1.0, "stop": 3.0, "begin": 0, "end": 4} | {name: "2"}
        with pytest.raises(TypeError, match=rf"^Ramp: expected a number as {name}, got '2'"):
            Ramp(**fields)


@pytest.mark.parametrize(
    ("value", "error"), [(3.0, TypeError), ("3", TypeError), (None, TypeError), (-1, ValueError)]
)
def test_num_features_is_an_integer(value: Any, error: type) -> None:
    with pytest.raises(error, match=r"^num_features: expected an integer >= 0, got "):
        BatchRenorm1d(value)


def test_numbers_that_are_none(eager: None) -> None:
    for value in (np.array([0.1, 0.2]), torch.tensor(0.1), 1j, np.complex64(1)):
        with pytest.raises(ValueError, match=r"^momentum: expected "):
            BatchRenorm1d(3, momentum=value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^r_max: expected "):
            BatchRenorm1d(3, r_max=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^momentum: expected "):
        BatchRenorm1d(3, momentum=np.float32("nan"))


def test_types_that_users_annotate_with() -> None:
    limit: Limit = Ramp(1.0, 2.0)
    assert limit.stop == 2.0
