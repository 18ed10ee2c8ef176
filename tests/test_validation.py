"""Bad input: the error names the argument, and nothing has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, batch_renorm

RAMP = Ramp(1.0, 3.0, begin=2, end=9)


def arguments(device: torch.device) -> dict[str, Any]:
    """A call that works; each test spoils one argument."""
    return {
        "input": torch.randn(8, 3, device=device),
        "running_mean": torch.randn(3, device=device),
        "running_var": torch.rand(3, device=device) + 0.5,
        "weight": torch.rand(3, device=device),
        "bias": torch.randn(3, device=device),
        "training": True,
        "num_batches_tracked": torch.tensor(7, device=device),
    }


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "meta" or torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def assert_refused(call: Callable[[], Any], watched: dict[str, Tensor], error: type, message: str) -> None:
    before = {name: t.clone() for name, t in watched.items()}
    versions = {name: t._version for name, t in watched.items()}
    with pytest.raises(error, match=message):
        call()
    for name, t in watched.items():
        assert same_bits(t.contiguous(), before[name].contiguous()), f"{name} has changed"
        assert t._version == versions[name], f"{name} has been written to"


NUMBERS = [
    ("eps", -1e-9, ValueError),
    ("eps", nan, ValueError),
    ("eps", inf, ValueError),
    ("eps", None, ValueError),
    ("eps", "1e-5", ValueError),
    ("momentum", -0.01, ValueError),
    ("momentum", 1.01, ValueError),
    ("momentum", nan, ValueError),
    ("momentum", "0.1", ValueError),
    ("r_max", 0.99, ValueError),
    ("r_max", nan, ValueError),
    ("r_max", "3", TypeError),
    ("r_max", True, TypeError),
    ("r_max", Ramp(0.5, 3.0), ValueError),
    ("d_max", -0.01, ValueError),
    ("d_max", nan, ValueError),
    ("d_max", [5.0], TypeError),
    ("running_average", "mean", ValueError),
    ("running_average", None, ValueError),
]
f16, f32, f64, i64 = torch.float16, torch.float32, torch.float64, torch.int64
TENSORS = [
    ("input", lambda: torch.randn(3), ValueError),
    ("input", lambda: torch.tensor(1.0), ValueError),
    ("input", lambda: torch.ones(8, 3, dtype=i64), TypeError),
    ("input", lambda: torch.ones(8, 3, dtype=torch.bool), TypeError),
    ("input", lambda: torch.ones(8, 3, dtype=torch.complex64), TypeError),
    ("input", lambda: torch.ones(8, 3).to(torch.float8_e4m3fn), TypeError),
    ("input", lambda: torch.randn(1, 3), ValueError),
    ("input", lambda: torch.randn(1, 3, 1, 1), ValueError),
    ("running_mean", lambda: torch.zeros(4), ValueError),
    ("running_mean", lambda: torch.zeros(1), ValueError),
    ("running_mean", lambda: torch.zeros(1, 3), ValueError),
    ("running_mean", lambda: torch.zeros(6)[::2], ValueError),
    ("running_mean", lambda: torch.zeros(3, requires_grad=True), ValueError),
    ("running_mean", lambda: torch.zeros(3, dtype=f16), TypeError),
    ("running_mean", lambda: torch.zeros(3, dtype=f64), TypeError),
    ("running_mean", lambda: torch.zeros(3, dtype=i64), TypeError),
    ("running_mean", lambda: torch.zeros(3, device="meta"), ValueError),
    ("running_mean", lambda: None, TypeError),
    ("running_var", lambda: None, TypeError),
    ("running_var", lambda: torch.ones(4), ValueError),
    ("running_var", lambda: torch.ones(3, 1), ValueError),
    ("running_var", lambda: torch.ones(6)[::2], ValueError),
    ("running_var", lambda: torch.ones(3, requires_grad=True), ValueError),
    ("running_var", lambda: torch.ones(3, dtype=torch.bfloat16), TypeError),
    ("running_var", lambda: torch.ones(3, device="meta"), ValueError),
    ("weight", lambda: torch.ones(4), ValueError),
    ("weight", lambda: torch.ones(3, 1), ValueError),
    ("weight", lambda: torch.ones(3, dtype=f16), TypeError),
    ("weight", lambda: torch.ones(3, dtype=f64), TypeError),
    ("weight", lambda: torch.ones(3, dtype=i64), TypeError),
    ("weight", lambda: torch.ones(3, device="meta"), ValueError),
    ("bias", lambda: torch.ones(4), ValueError),
    ("bias", lambda: torch.ones(3, dtype=torch.bfloat16), TypeError),
    ("bias", lambda: torch.ones(3, device="meta"), ValueError),
    ("num_batches_tracked", lambda: torch.zeros(2, dtype=i64), TypeError),
    ("num_batches_tracked", lambda: torch.zeros((), dtype=f32), TypeError),
    ("num_batches_tracked", lambda: torch.zeros((), dtype=torch.int32), TypeError),
    ("num_batches_tracked", lambda: torch.zeros((), dtype=i64, device="meta"), ValueError),
]


def on(device: torch.device, t: Tensor | None) -> Tensor | None:
    if t is None or t.device.type == "meta":
        return t
    moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return moved.copy_(t.detach()).requires_grad_(t.requires_grad)


@pytest.mark.parametrize(("name", "value", "error"), NUMBERS)
def test_numbers_of_the_function(name: str, value: Any, error: type, eager: None, device) -> None:
    values = arguments(device) | {name: value}
    assert_refused(lambda: batch_renorm(**values), tensors(values), error, rf"^{name}: expected ")


@pytest.mark.parametrize(("name", "make", "error"), TENSORS)
def test_tensors_of_the_function(
    name: str, make: Callable[[], Tensor], error: type, eager: None, device
) -> None:
    values = arguments(device)
    values[name] = on(device, make())
    message = rf"^{name}: expected "
    assert_refused(lambda: batch_renorm(**values), tensors(values), error, message)


@pytest.mark.parametrize("training", [True, False])
def test_a_half_precision_input_takes_its_dtype_or_float32(training: bool, eager: None, device) -> None:
    values = arguments(device) | {"training": training}
    values["input"] = values["input"].half()
    batch_renorm(**values)
    batch_renorm(**values | {"weight": values["weight"].half(), "bias": values["bias"].half()})
    for name in ("weight", "bias"):
        bad = values | {name: values[name].bfloat16()}
        assert_refused(lambda bad=bad: batch_renorm(**bad), tensors(bad), TypeError, rf"^{name}: expected ")


@pytest.mark.parametrize("missing", [{"momentum": None}, {"r_max": RAMP}, {"d_max": RAMP}])
def test_the_counter_is_asked_for(missing: dict[str, Any], eager: None, device) -> None:
    values = arguments(device) | {"num_batches_tracked": None} | missing
    assert_refused(
        lambda: batch_renorm(**values), tensors(values), ValueError, r"^num_batches_tracked: .* needs it"
    )
    batch_renorm(**values | {"training": False})


def test_one_value_per_channel_serves_inference(eager: None, device) -> None:
    values = arguments(device) | {"input": torch.randn(1, 3, device=device), "training": False}
    assert batch_renorm(**values).isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"begin": 9, "end": 8}, "begin=9, end=8"),
        ({"begin": -1, "end": 8}, "begin=-1"),
        ({"start": nan}, "start"),
        ({"start": -1.0}, "start"),
        ({"stop": inf}, "stop"),
    ],
)
def test_ramps(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Ramp: expected .*{message}"):
        Ramp(**{"start": 1.0, "stop": 3.0, "begin": 0, "end": 10} | values)


@pytest.mark.parametrize(("name", "value", "error"), NUMBERS)
def test_numbers_of_the_layer(name: str, value: Any, error: type, eager: None, device) -> None:
    with pytest.raises(error, match=rf"^{name}: expected "):
        BatchRenorm1d(3, **{name: value})

    layer = BatchRenorm1d(3).to(device)
    x = torch.randn(8, 3, device=device)
    if name in ("r_max", "d_max"):
        before = getattr(layer, name)
        with pytest.raises(error, match=rf"^{name}: expected "):
            setattr(layer, name, value)
        assert getattr(layer, name) == before
    else:  # plain attributes, as torch.nn.BatchNorm's: they are looked at when used
        setattr(layer, name, value)
        assert_refused(lambda: layer(x), layer.state_dict(), error, rf"^{name}: expected ")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "ranks"), [(BatchRenorm1d, (2, 3)), (BatchRenorm2d, (4,)), (BatchRenorm3d, (5,))]
)
def test_ranks_and_channels_of_the_layer(
    layer: type, ranks: tuple, training: bool, eager: None, device
) -> None:
    module = layer(3).to(device).train(training)
    for rank in set(range(7)) - set(ranks):
        x = torch.randn((2, 3, 2, 2, 2, 2)[:rank], device=device)
        assert_refused(
            lambda x=x: module(x), module.state_dict(), ValueError, rf"^input: expected .*got {rank}D"
        )
    for rank in ranks:
        for channels in (1, 2, 4):
            x = torch.randn((4, channels, 2, 2, 2)[:rank], device=device)
            message = rf"^input: expected 3 channels, got {channels}"
            assert_refused(lambda x=x: module(x), module.state_dict(), ValueError, message)
        module(torch.randn((4, 3, 2, 2, 2)[:rank], device=device))


def test_tensors_of_the_layer(eager: None, device) -> None:
    layer = BatchRenorm2d(3).to(device)
    good = torch.randn(2, 3, 4, 4, device=device)

    def refused(x: Tensor, error: type, message: str, module: nn.Module = layer) -> None:
        assert_refused(lambda: module(x), module.state_dict(), error, message)

    refused(good.long(), TypeError, "^input: expected ")
    refused(good.to(torch.complex64), TypeError, "^input: expected ")
    refused(good[:1, :, :1, :1], ValueError, "^input: expected more than 1 value per channel")
    refused(good.double(), TypeError, "^running_mean: expected float64")
    refused(good.to("meta"), ValueError, "^running_mean: expected the input's device")
    half = BatchRenorm2d(3, dtype=f16).to(device)
    refused(good, TypeError, "^weight: expected float32", half)
    layer.running_var = torch.ones(3, dtype=f16, device=device)
    refused(good, TypeError, "^running_var: expected float32")
    layer.running_var = torch.ones(4, device=device)
    refused(good, ValueError, r"^running_var: expected shape \(3,\)")


def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch, device) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "cuda")
    values = arguments(device)
    message = "^TRITON_BRN_BACKEND: expected one of auto, triton, eager, got 'cuda'"
    assert_refused(lambda: batch_renorm(**values), tensors(values), ValueError, message)


def test_a_backend_forced_where_it_cannot_run() -> None:
    """A process of its own, without the interpreter: the kernels cannot serve a CPU tensor there."""
    script = """
import os
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_BRN_BACKEND"] = "triton"
import torch
from triton_brn import BatchRenorm1d
layer = BatchRenorm1d(3)
before = {k: v.clone() for k, v in layer.state_dict().items()}
for train in (True, False):
    try:
        layer.train(train)(torch.randn(8, 3))
    except RuntimeError as error:
        assert str(error).startswith("TRITON_BRN_BACKEND=triton cannot serve a tensor on cpu: "), error
    else:
        raise AssertionError("no error")
assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
os.environ["TRITON_BRN_BACKEND"] = "auto"
layer(torch.randn(8, 3))
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
