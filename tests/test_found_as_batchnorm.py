"""What looks for torch's BatchNorm finds the layers, and they take what BatchNorm takes."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    from_case,
    inputs,
    reference_gradients,
    sum_scales,
)
from torch import nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, convert_batchnorm

PAIRS = [(BatchRenorm1d, nn.BatchNorm1d), (BatchRenorm2d, nn.BatchNorm2d), (BatchRenorm3d, nn.BatchNorm3d)]
SHAPES = {BatchRenorm1d: (8, 3), BatchRenorm2d: (4, 3, 2, 3), BatchRenorm3d: (2, 3, 2, 3, 2)}
each_layer = pytest.mark.parametrize(("renorm", "norm"), PAIRS)


@each_layer
def test_the_layers_are_batchnorms_of_their_rank(renorm: type, norm: type) -> None:
    layer = renorm(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert [isinstance(layer, other) for _, other in PAIRS] == [other is norm for _, other in PAIRS]
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert (layer.num_features, layer.eps, layer.momentum, layer.affine) == (3, 1e-5, 0.01, True)
    assert layer.track_running_stats is True


@each_layer
def test_batchnorms_arguments_are_taken_in_its_order(renorm: type, norm: type) -> None:
    theirs, ours = (inspect.signature(layer).parameters.values() for layer in (norm, renorm))
    positional = [[p.name for p in s if p.kind is p.POSITIONAL_OR_KEYWORD] for s in (theirs, ours)]
    assert positional[0] == positional[1]
    assert {p.name for p in theirs} <= {p.name for p in ours}
    layer = renorm(3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert (layer.eps, layer.momentum, layer.weight.dtype) == (1e-3, 0.2, torch.float64)


@each_layer
def test_without_running_statistics_it_is_refused(renorm: type, norm: type) -> None:
    for arguments in ((3, 1e-5, 0.1, True, False), (3,)):
        with pytest.raises(ValueError, match=r"^track_running_stats: expected True, got False: .*BatchNorm"):
            renorm(*arguments, **({"track_running_stats": False} if len(arguments) == 1 else {}))


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 2, 3), (2, 3, 2, 3, 2)])
def test_a_weight_without_a_bias(shape: tuple, backend: str, device) -> None:
    renorm = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}[len(shape)]
    case = replace(inputs(shape, device=device), bias=torch.zeros(3, device=device))
    for training in (True, False):
        layer = renorm(3, r_max=3.0, d_max=5.0, bias=False).to(device).train(training)
        layer.load_state_dict(
            {k: v for k, v in from_case(renorm(3), case).state_dict().items() if k != "bias"}
        )
        assert layer.bias is None
        x = case.x.clone().requires_grad_()
        y = layer(x)
        y.backward(case.dy)
        dx, dweight, _ = reference_gradients(case.dy, *case.args, training=training)
        scale = sum_scales(case.dy, case.x, case.running_mean, case.running_var, training=training)[0]
        if training:
            assert_accurate(y, batch_renorm_reference(*case.args).y)
        assert_accurate(x.grad, dx)
        assert_accurate(layer.weight.grad, dweight, scale=scale)


def test_a_layer_without_a_bias_keeps_doing_so() -> None:
    layer = BatchRenorm2d(3, bias=False)
    assert "affine=True, bias=False" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.bias is None
        assert repr(twin) == repr(layer)
    layer.reset_parameters()
    assert layer.weight.tolist() == [1.0] * 3


@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_without_a_bias_is_converted(affine: bool) -> None:
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this torch's BatchNorm has no bias argument")
    old = nn.BatchNorm2d(3, affine=affine, bias=False)
    new = convert_batchnorm(old)
    assert new.bias is None
    assert new.weight is old.weight
    assert list(new.state_dict()) == list(old.state_dict())
