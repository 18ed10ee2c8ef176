"""In eval, tracers get torch's own batch norm: exported, folded, and loaded without this package."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, batch_renorm

RANKS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated", "ignore:You are using the legacy", "ignore:The feature will be removed"
)


def trained(norm: nn.Module) -> nn.Module:
    """A layer in eval whose numbers are no defaults."""
    with torch.no_grad():
        for vector in (norm.weight, norm.bias, norm.running_mean):
            if vector is not None:
                vector.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.eval()


def network(norm: Callable[..., nn.Module] = BatchRenorm2d) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), trained(norm(8)), nn.ReLU()),
        *(nn.Conv2d(8, 4, 1), trained(norm(4)), nn.ReLU()),
    ).eval()


def exported(strict: bool) -> Callable[..., Callable]:
    return lambda module, x: torch.export.export(module, (x,), strict=strict).module()


def compiled(module: nn.Module, x: Tensor) -> Callable:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


TRACERS: dict[str, Callable[..., Callable]] = {
    "jit.trace": torch.jit.trace,
    "jit.script": lambda module, x: torch.jit.script(module),
    "strict export": exported(True),
    "export": exported(False),
    "make_fx": lambda module, x: make_fx(module)(x),
    "make_fx before dispatch": lambda module, x: make_fx(module, pre_dispatch=True)(x),
    "symbolic_trace": lambda module, x: torch.fx.symbolic_trace(nn.Sequential(module)),
    "compile": compiled,
}


def input_of(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device) -> Tensor:
    x = torch.randn(shape, dtype=dtype, device=device)
    if channels_last and x.ndim > 3:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.to(memory_format=formats[x.ndim])
    return x


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    ("rank", "channels_last", "dtype", "options"),
    [
        (2, False, torch.float32, {}),
        (3, False, torch.float64, {"dtype": torch.float64}),
        (4, True, torch.float32, {"affine": False}),
        (4, False, torch.float16, {}),
        (4, False, torch.float32, {"bias": False}),
        (5, True, torch.bfloat16, {"dtype": torch.bfloat16}),
    ],
)
def test_traced_is_untraced(
    tracer: str, rank: int, channels_last: bool, dtype: torch.dtype, options: dict, eager: None, device
) -> None:
    layer = trained(RANKS[rank](3, device=device, **options))
    x = input_of((4, 3, 5, 2, 3)[:rank], dtype, channels_last, device).requires_grad_()
    if "export" in tracer or "make_fx" in tracer:  # these want leaves without gradients
        x = x.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = TRACERS[tracer](layer, x)
    x = x.detach().requires_grad_()
    y, expected = traced(x), layer(x)
    assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    if "make_fx" in tracer:  # whose gradients are constants of another trace
        return
    dy = torch.randn_like(expected)
    wanted = [x] if "export" in tracer else [x, *layer.parameters()]
    for actual, right in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("tracer", ["jit.trace", "export", "make_fx", "compile"])
def test_the_function_without_weight(tracer: str, eager: None, device) -> None:
    bias = torch.arange(6.0, device=device)[::2]  # strided, too

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean, var = torch.ones(3, device=device), torch.ones(3, device=device)
            return batch_renorm(x, mean, var, None, bias, eps=1e-3)

    x = torch.randn(4, 3, 5, device=device)
    torch.testing.assert_close(TRACERS[tracer](Shifted(), x)(x), Shifted()(x))


def operators(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_operators_are_torchs(eager: None, device) -> None:
    """With gradients on: as users trace."""
    ours, theirs = network().to(device), network(nn.BatchNorm2d).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    for strict in (True, False):
        graphs = [torch.export.export(m, (x,), strict=strict).graph for m in (ours, theirs)]
        assert "aten.batch_norm.default" in operators(graphs[0])
        assert operators(graphs[0]) == operators(graphs[1])
    assert operators(make_fx(ours)(x).graph) == operators(make_fx(theirs)(x).graph)
    kinds = [
        [node.kind() for node in torch.jit.trace(m, x).inlined_graph.nodes() if "aten" in node.kind()]
        for m in (ours, theirs)
    ]
    assert "aten::batch_norm" in kinds[0]
    assert kinds[0] == kinds[1]


def test_modes_and_fakes(eager: None, device) -> None:
    layer = trained(BatchRenorm2d(3, device=device))
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(layer(x), layer(x.clone()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)


def test_a_traced_layer_takes_other_sizes(eager: None, device) -> None:
    model = network().to(device)
    x, other = torch.randn(2, 3, 6, 6, device=device), torch.randn(5, 3, 7, 4, device=device)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    for traced in (torch.jit.trace(model, x), torch.jit.script(model), program):
        torch.testing.assert_close(traced(other), model(other))


READER = """
import sys
sys.modules["triton_brn"] = None  # importing it raises
import torch
x, expected = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    load = torch.export.load(path).module if path.endswith(".pt2") else lambda: torch.jit.load(path)
    torch.testing.assert_close(load()(x), expected)
    print("read", path)
"""


def test_files_load_without_this_package(eager: None, tmp_path: Path) -> None:
    model, x = network(), torch.randn(2, 3, 6, 6)
    torch.save((x, model(x).detach()), tmp_path / "values")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "exported.pt2")
    torch.jit.trace(model, x).save(tmp_path / "traced.pt")
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    paths = [str(tmp_path / name) for name in ("values", "exported.pt2", "traced.pt", "scripted.pt")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, *paths], capture_output=True, text=True, check=False
    )
    assert done.stdout.count("read") == 3, done.stderr


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(("dynamic", "training"), [(True, False), (False, False), (False, True)])
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_onnx(dynamo: bool, dynamic: bool, training: bool, eager: None, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    options: dict[str, Any] = {}
    if dynamic:
        sizes = {0: "batch", 2: "height", 3: "width"}
        options = (
            {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": sizes}}
        )
    model, x = network(), torch.randn(2, 3, 6, 6)
    model.train(training)  # the exporters do what they do with BatchNorm: warn, and export inference
    path = str(tmp_path / "model.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=dynamo, **options)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Conv", "Relu", "Conv", "Relu"]
    model.eval()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 5) if dynamic else (2,):
        x = torch.randn(batch, 3, 6, 6)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


NETWORKS: dict[str, tuple[Callable[..., list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda norm: [nn.Linear(3, 4), norm[0](4), nn.ReLU()], (2, 3)),
    "conv3d": (lambda norm: [nn.Conv3d(3, 4, 2), norm[2](4, bias=False)], (2, 3, 3, 3, 3)),
    "norm first": (lambda norm: [norm[1](3, affine=False), nn.Conv2d(3, 4, 2)], (2, 3, 5, 5)),
}


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("what", NETWORKS)
def test_onnx_nodes_are_batchnorms(what: str, dynamo: bool, eager: None, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    make, shape = NETWORKS[what]
    nodes = []
    for norm in (
        (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    ):
        path = str(tmp_path / "model.onnx")
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(nn.Sequential(*make(norm)).eval(), (torch.randn(shape),), path, dynamo=dynamo)
        nodes.append([node.op_type for node in onnx.load(path).graph.node])
    assert nodes[0] == nodes[1]


def test_scripted_training_is_refused(eager: None, device) -> None:
    model = network().to(device)
    scripted = torch.jit.script(copy.deepcopy(model).train())
    x = torch.randn(2, 3, 6, 6, device=device)
    with pytest.raises(torch.jit.Error, match=r"scripted for inference only: call \.eval\(\)"):
        scripted(x)
    torch.testing.assert_close(scripted.eval()(x), model(x))
    assert isinstance(model[1], BatchRenorm2d)


def test_the_function_is_not_scripted() -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_renorm(x, mean, var)

    with pytest.raises(RuntimeError, match=r"batch_renorm cannot be scripted: use a BatchRenorm layer"):
        torch.jit.script(function)
