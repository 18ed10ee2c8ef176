"""torch.fx and torch.ao.quantization take the layers as they take torch.nn's BatchNorm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, batch_renorm, revert_to_batchnorm

LAYERS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Please use quant_min")


class Network(nn.Module):
    """With a sum, and one layer used twice."""

    def __init__(self, norm: Callable[..., nn.Module] = BatchRenorm2d) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU()
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):  # annotations would be strings, which torch.fx does not pickle
        x = self.act(self.norm(self.conv(x)))
        return self.norm(x + self.head(x))


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training: bool, eager: None) -> None:
    ours = Network().train(training)
    nodes = [
        [
            (node.op, node.target)
            for node in torch.fx.symbolic_trace(model).graph.nodes
            if node.op != "call_function"
        ]
        for model in (ours, Network(nn.BatchNorm2d).train(training))
    ]
    assert nodes[0] == nodes[1]
    assert ("call_module", "head.1") in nodes[0]
    x = torch.randn(5, 3, 4, 4)
    traced = torch.fx.symbolic_trace(copy.deepcopy(ours))
    for again in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        model = copy.deepcopy(ours)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        for actual, expected in zip(again.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # The trace holds the layer, not what it was when it was traced.
    model.train(not training), traced.load_state_dict(model.state_dict())
    torch.testing.assert_close(traced.train(not training)(x), model(x), rtol=0, atol=0)


def test_hooks_run_once(eager: None) -> None:
    model = nn.Sequential(BatchRenorm2d(3)).eval()
    calls = []
    model[0].register_forward_hook(lambda layer, args, y: calls.append(type(y)))
    traced = torch.fx.symbolic_trace(model)
    assert calls == []
    traced(torch.randn(2, 3, 4, 4))
    assert calls == [Tensor]


@pytest.mark.parametrize("training", [True, False])
def test_the_function_is_a_node(training: bool, eager: None) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchRenorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            norm, ramp = self.norm, Ramp(1.0, 3.0, 0, 10)
            statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
            counter = norm.num_batches_tracked
            return batch_renorm(
                x, *statistics, *affine, training=training, r_max=ramp, num_batches_tracked=counter
            )

    model, x = Functional(), torch.randn(4, 3, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"][-1] is batch_renorm
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    assert traced.norm.num_batches_tracked == model.norm.num_batches_tracked == training


def test_what_is_no_tensor_is_refused(eager: None) -> None:
    layer = BatchRenorm1d(3)
    with pytest.raises(TypeError, match=r"^input: expected a tensor, got list"):
        batch_renorm([1.0], layer.running_mean, layer.running_var)  # type: ignore[arg-type]


def test_layers_are_their_classes() -> None:
    """What makes a layer whole to torch.fx is no matter of its class, nor of a user's subclass."""

    class Mine(BatchRenorm2d):
        pass

    tracer = torch.fx.Tracer()
    for layer in (kind(3) for kind in LAYERS):
        assert tracer.is_leaf_module(layer, "norm")
        assert type(layer).__module__.startswith("triton_brn.")
        again = pickle.loads(pickle.dumps(layer))
        assert type(again) is type(layer)
        assert tracer.is_leaf_module(again, "norm")
    assert not tracer.is_leaf_module(Mine(3), "norm")


def test_feature_extraction(eager: None) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    for training in (True, False):
        ours = extraction.get_graph_node_names(Network().train(training))
        assert ours == extraction.get_graph_node_names(Network(nn.BatchNorm2d).train(training))
    assert "head.1" in ours[1]
    model, x = Network().eval(), torch.randn(2, 3, 4, 4)
    features = extraction.create_feature_extractor(model, ["norm", "head"])(x)
    torch.testing.assert_close(features["norm"], model.norm(model.conv(x)))


FUSED = {
    "conv1d": (lambda: [nn.Conv1d(3, 4, 2), BatchRenorm1d(4), nn.ReLU()], (2, 3, 5)),
    "conv2d": (lambda: [nn.Conv2d(3, 4, 2), BatchRenorm2d(4)], (2, 3, 5, 5)),
    "conv2d relu": (
        lambda: [nn.Conv2d(3, 4, 2, bias=False), BatchRenorm2d(4, affine=False), nn.ReLU()],
        (2, 3, 5, 5),
    ),
    "conv3d relu": (lambda: [nn.Conv3d(3, 4, 2), BatchRenorm3d(4, bias=False), nn.ReLU()], (2, 3, 3, 3, 3)),
    "linear": (lambda: [nn.Linear(3, 4), BatchRenorm1d(4)], (2, 3)),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 4, 2), BatchRenorm2d(4)], (2, 3, 5, 5)),
    "relu": (lambda: [BatchRenorm2d(3), nn.ReLU()], (2, 3, 5, 5)),
}


@pytest.mark.parametrize("what", FUSED)
def test_fuse_modules(what: str, eager: None) -> None:
    make, shape = FUSED[what]
    model, x = nn.Sequential(*make()), torch.randn(shape)
    for _ in range(3):
        model(x * 2 + 1)
    model.eval()
    fused = quantization.fuse_modules(model, [[str(i) for i in range(len(model))]])
    assert not any(isinstance(m, LAYERS) for m in fused.modules())
    torch.testing.assert_close(fused(x), model(x))


def test_fuse_modules_qat(eager: None, caplog: pytest.LogCaptureFixture) -> None:
    """torch's fused modules train a BatchNorm, and take no other."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 2), BatchRenorm2d(4), nn.ReLU()), torch.randn(4, 3, 5, 5)
    model(x)
    fused = quantization.fuse_modules_qat(model, [["0", "1", "2"]])
    assert "becomes a BatchNorm" in caplog.text
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))
    assert fused.train()[0][1].weight is not model[1].weight
    fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(fused)(x).sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_quantization_by_fx(training: bool, eager: None) -> None:
    """The layers are kept, where BatchNorm is folded: revert_to_batchnorm comes first, or the norm is not."""
    from torch.ao.quantization import quantize_fx

    model, x = Network().train(training), torch.randn(8, 3, 4, 4)
    if training:
        mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
        prepared = quantize_fx.prepare_qat_fx(model, mapping, (x,))
    else:
        mapping = quantization.get_default_qconfig_mapping("fbgemm")
        prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared.eval())
    assert (quantized(x) - model.eval()(x)).abs().max() < 0.2


def test_reverted_layers_are_folded(eager: None) -> None:
    """By whoever asks for BatchNorm's very type."""
    from torch.ao.quantization import quantize_fx
    from torch.fx.experimental import optimization

    model, x = Network(), torch.randn(5, 3, 4, 4)
    model.head(model.conv(x))
    expected = model.eval()(x)
    reverted = revert_to_batchnorm(copy.deepcopy(model))
    for fused in (optimization.fuse(reverted), quantize_fx.fuse_fx(reverted)):
        targets = [str(node.target) for node in fused.graph.nodes]
        assert "head.0" in targets
        assert "head.1" not in targets
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
