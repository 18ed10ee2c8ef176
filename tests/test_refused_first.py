"""A training call that cannot be served is refused before anything has changed, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_validation import assert_refused
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, batch_renorm

#: Limits that act, and those at which plain PyTorch leaves all to torch's batch norm.
LIMITS = [{"r_max": 3.0, "d_max": 5.0}, {"r_max": 1.0, "d_max": 0.0}]
SHAPES = [(8, 3), (4, 3, 5, 5), (4, 3, 150, 150)]
VECTORS = ("running_mean", "running_var", "weight", "bias")

pytestmark = pytest.mark.usefixtures("backend", "_on_device")


@pytest.fixture
def _on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def arguments(shape: tuple[int, ...] = (8, 3), **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "input": torch.randn(shape),
        "running_mean": torch.randn(3),
        "running_var": torch.rand(3) + 0.5,
        "weight": nn.Parameter(torch.rand(3)),
        "bias": nn.Parameter(torch.randn(3)),
        "training": True,
        "num_batches_tracked": torch.tensor(7),
        "r_max": 3.0,
        "d_max": 5.0,
    }
    return values | changes


def refused(values: dict[str, Any], error: type, message: str) -> None:
    """Nothing has changed, nor been written to; inference tensors do not count writes."""
    watched = {
        name: t
        for name, t in values.items()
        if isinstance(t, Tensor) and not t.is_inference() and t.layout is torch.strided and not t.is_nested
    }
    watched = {name: t.detach() for name, t in watched.items()}
    frozen = {n: t for n, t in values.items() if isinstance(t, Tensor) and t.is_inference()}
    before = {name: t.clone() for name, t in frozen.items()}
    assert_refused(lambda: batch_renorm(**values), watched, error, message)
    assert all(torch.equal(t, before[name]) for name, t in frozen.items())


def of_inference(t: Tensor, learned: bool = False) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone().requires_grad_(learned)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("name", ["input", "weight"])
def test_inference_tensors_that_a_gradient_needs(name: str, shape: tuple, limits: dict, backend: str) -> None:
    values = arguments(shape, **limits)
    values[name] = of_inference(values[name])
    refused(values, RuntimeError, rf"^{name}: Inference tensors cannot be saved for backward")
    with torch.no_grad():
        batch_renorm(**values)
    assert values["num_batches_tracked"].item() == 8
    if name == "input":
        values |= {"weight": values["weight"].detach(), "bias": values["bias"].detach()}
        assert not batch_renorm(**values).requires_grad


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_inference_tensors_that_would_be_updated(name: str, learned: bool, limits: dict) -> None:
    values = arguments(**limits)
    values[name] = of_inference(values[name])
    if not learned:
        values |= {"weight": None, "bias": None}
    refused(values, RuntimeError, rf"^{name}: Inplace update to inference tensor outside InferenceMode")
    with torch.inference_mode():
        assert batch_renorm(**values).isfinite().all()
    assert values["num_batches_tracked"].item() == 8


def test_a_layer_made_in_inference_mode_trains_there_only() -> None:
    with torch.inference_mode():
        layer = BatchRenorm1d(3)
        layer(torch.randn(8, 3))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"^running_mean: .*outside torch.inference_mode"):
        layer(torch.randn(8, 3))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.num_batches_tracked.item() == 1
    layer.eval().requires_grad_(False)(torch.randn(8, 3))


def test_a_layer_made_outside_trains_in_inference_mode() -> None:
    layer = BatchRenorm1d(3)
    with torch.inference_mode():
        layer(torch.randn(8, 3))
    layer(torch.randn(8, 3)).sum().backward()
    assert layer.num_batches_tracked.item() == 2


def sharing(values: dict[str, Any], name: str, with_name: str, how: str) -> None:
    """Let two arguments lie in the same memory."""
    owner = values[with_name]
    if how == "same":
        values[name] = owner
    elif how == "parameter":
        values[name] = nn.Parameter(owner, requires_grad=name in ("weight", "bias"))
    elif how == "view":
        values[name] = owner.view(1, 3)[0]
    else:
        arena = torch.arange(1.0, 6.0)
        values[with_name], values[name] = arena[:3], arena[2:]


SHARED = [
    (name, with_name, how)
    for name, with_name in [("running_var", "running_mean")]
    + [(name, owner) for name in ("weight", "bias") for owner in ("running_mean", "running_var")]
    for how in ("same", "parameter", "view", "overlapping")
    if how != "overlapping" or name == "running_var"
]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("name", "with_name", "how"), SHARED)
def test_memory_that_is_updated_is_not_shared(name: str, with_name: str, how: str, limits: dict) -> None:
    values = arguments(**limits)
    sharing(values, name, with_name, how)
    refused(values, ValueError, rf"^{name}: expected memory of its own, .*{with_name}.*clone")
    batch_renorm(**values | {"training": False})


def test_neighbours_in_memory_are_fine() -> None:
    """As in buffers and parameters that were flattened into one tensor."""
    arena = torch.rand(12) + 0.5
    names = ("running_mean", "running_var", "weight", "bias")
    values = arguments(**dict(zip(names, arena.view(4, 3), strict=True)))
    batch_renorm(**values)
    values = arguments(**dict(zip(reversed(names), arena.view(4, 3).clone(), strict=True)))
    batch_renorm(**values)
    weight = nn.Parameter(torch.rand(3))
    batch_renorm(**arguments(weight=weight, bias=weight)).sum().backward()


@pytest.mark.parametrize("channels", [0, 1])
def test_few_channels_are_not_taken_for_shared_memory(channels: int) -> None:
    layer = BatchRenorm1d(channels)
    assert layer(torch.randn(4, channels)).shape == (4, channels)


NOT_DENSE: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("layout torch.sparse_coo", lambda x: x.to_sparse()),
    ("layout torch.sparse_coo", lambda x: x.to_sparse(1)),
    ("layout torch.sparse_csr", lambda x: x.to_sparse_csr()),
    ("a nested tensor", lambda x: torch.nested.nested_tensor(list(x.split(4)))),
    ("a nested tensor", lambda x: torch.nested.nested_tensor(list(x.split(4)), layout=torch.jagged)),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(("kind", "make"), NOT_DENSE)
def test_tensors_that_are_not_dense(kind: str, make: Callable[[Tensor], Any]) -> None:
    values = arguments()
    refused(
        values | {"input": make(values["input"])}, TypeError, f"^input: expected a dense tensor, got {kind}"
    )
    if kind == "layout torch.sparse_coo":
        for name in VECTORS:
            value = values[name].detach().to_sparse()
            refused(values | {name: value}, TypeError, f"^{name}: expected a dense tensor, got {kind}")
        refused(
            values | {"num_batches_tracked": torch.tensor([7]).to_sparse()},
            TypeError,
            r"^num_batches_tracked: expected a dense tensor",
        )


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0, 3.0], "x", torch.ones(3).numpy()])
@pytest.mark.parametrize("name", ["input", *VECTORS, "num_batches_tracked"])
def test_what_is_no_tensor(name: str, value: Any) -> None:
    if value is None and name in ("weight", "bias", "num_batches_tracked"):
        batch_renorm(**arguments(**{name: value}))
        return
    refused(
        arguments(**{name: value}), TypeError, f"^{name}: expected a tensor, got {type(value).__name__[:4]}"
    )


@pytest.mark.parametrize("training", [True, False])
def test_another_precision_names_the_cure(training: bool) -> None:
    single, double = (
        BatchRenorm2d(3, dtype=dtype).train(training) for dtype in (torch.float32, torch.float64)
    )
    x = torch.randn(2, 3, 4, 4)
    for layer, wrong, message in (
        (
            single,
            x.double(),
            r"float64 for a float64 input, got float32: call layer.double\(\), or input.float",
        ),
        (double, x, r"float32 for a float32 input, got float64: call layer.float\(\), or input.double"),
        (double, x.half(), r"float32 for a float16 input, got float64: call layer.float\(\)"),
    ):
        assert_refused(
            lambda layer=layer, wrong=wrong: layer(wrong),
            layer.state_dict(),
            TypeError,
            rf"^running_mean: expected {message}",
        )
    single.double()(x.double())
    double.float()(x)
    half = BatchRenorm2d(3, dtype=torch.float16).train(training)
    with pytest.raises(TypeError, match=r"^weight: expected float32 .*got float16: call layer.float\(\)$"):
        half(x)
    half.float()(x)
