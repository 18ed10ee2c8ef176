"""revert_to_batchnorm: batch renorm layers become BatchNorm again, with the same outputs in eval."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from triton_brn import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    BatchRenormAct2d,
    convert_batchnorm,
    convert_batchrenorm,
    revert_to_batchnorm,
)

pytestmark = pytest.mark.usefixtures("eager")

LAYERS = [
    (BatchRenorm1d, nn.BatchNorm1d, (8, 3)),
    (BatchRenorm2d, nn.BatchNorm2d, (4, 3, 2, 3)),
    (BatchRenorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]


def trained(layer: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        layer(torch.randn(shape).to(dtype) * 2 + 1)
    return layer


@pytest.mark.parametrize(("renorm", "norm", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
def test_eval_outputs_are_equal(
    renorm: Any, norm: Any, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, bool]
) -> None:
    layer = trained(renorm(3, eps=1e-3, momentum=0.3, **options).to(dtype), shape, dtype)
    net = nn.Sequential(copy.deepcopy(layer))
    state = layer.state_dict()
    assert revert_to_batchnorm(net) is net
    assert type(net[0]) is norm
    assert set(vars(net[0])) == set(vars(norm(3)))
    assert (net[0].eps, net[0].momentum, net[0].affine) == (1e-3, 0.3, options.get("affine", True))
    assert list(net.state_dict().values())[-1] == 3
    for name, value in net[0].state_dict().items():
        torch.testing.assert_close(value.to(state[name].dtype), state[name], rtol=1e-2, atol=1e-2)
    x = torch.randn(shape).to(dtype)
    tight = (
        {"rtol": 1e-5, "atol": 1e-5}
        if dtype in (torch.float32, torch.float64)
        else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(net.eval()(x), layer.eval()(x), **tight)
    assert net.train()(x).dtype == dtype


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_there_and_back_in_half_precision_is_exact(half: torch.dtype) -> None:
    net = nn.Sequential(trained(nn.BatchNorm2d(3), (4, 3, 2, 2))).to(half)
    state = copy.deepcopy(net.state_dict())
    revert_to_batchnorm(convert_batchnorm(net))
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert list(net.state_dict()) == list(state)


@pytest.mark.parametrize(
    ("momentum", "expected"), [(0.01, 0.1), (0.001, 0.001), (0.0, 0.0), (0.3, 0.3), (None, None)]
)
def test_momentum(momentum: float | None, expected: float | None) -> None:
    layer = BatchRenorm1d(3, momentum=momentum)
    assert revert_to_batchnorm(layer).momentum == expected
    assert revert_to_batchnorm(layer, momentum=0.2).momentum == 0.2
    assert revert_to_batchnorm(layer, momentum=None).momentum is None


def test_training_is_batch_norm_again() -> None:
    net = convert_batchnorm(nn.Sequential(trained(nn.BatchNorm2d(3), (4, 3, 2, 2))))
    x = torch.randn(4, 3, 2, 2)
    assert not torch.allclose(net(x).mean((0, 2, 3)), net[0].bias, atol=1e-3)
    revert_to_batchnorm(net)
    torch.testing.assert_close(net(x).mean((0, 2, 3)), net[0].bias)


def test_a_layer_that_was_told_not_to_update_keeps_to_it() -> None:
    layer = trained(BatchRenorm2d(3).half(), (4, 3, 2, 2), torch.half)
    layer.track_running_stats = False
    state = copy.deepcopy(layer.state_dict())
    norm = revert_to_batchnorm(layer)
    norm(torch.randn(4, 3, 2, 2).half())
    torch.testing.assert_close(norm.state_dict(), state, check_dtype=False, rtol=1e-3, atol=1e-3)
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    assert revert_to_batchnorm(layer)(torch.randn(4, 3, 2, 2).half()).dtype == torch.half


def test_a_syncbatchnorm_is_one_again() -> None:
    group = object()
    norm = trained(nn.SyncBatchNorm(3), (8, 3))
    norm.process_group = group
    net = convert_batchnorm(nn.Sequential(norm))
    x = torch.randn(8, 3, 4)
    expected = net.eval()(x)
    revert_to_batchnorm(net)
    assert type(net[0]) is nn.SyncBatchNorm
    assert net[0].process_group is group
    assert set(vars(net[0])) == set(vars(nn.SyncBatchNorm(3)))
    torch.testing.assert_close(net(x), expected)


class Rescaled(BatchRenorm2d):
    """A subclass of somebody's."""


def test_subclasses_are_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(Rescaled(3), BatchRenorm2d(3))
    with caplog.at_level(logging.INFO, "triton_brn"):
        revert_to_batchnorm(net)
    assert [type(m) for m in net] == [Rescaled, nn.BatchNorm2d]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "revert_to_batchnorm: 1 converted (1 BatchRenorm2d to BatchNorm2d); "
        "1 left (0: Rescaled, a subclass that may do more)"
    )


def test_nothing_to_revert() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    assert revert_to_batchnorm(net) is net
    with pytest.raises(ValueError, match="nothing was converted: the module has no BatchRenorm"):
        revert_to_batchnorm(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="nothing was converted; 1 left"):
        revert_to_batchnorm(nn.Sequential(Rescaled(3)))


def test_a_layer_with_an_activation_becomes_one_that_computes_the_same() -> None:
    layer = trained(BatchRenormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Dropout), (4, 3, 2, 2)).eval()
    x = torch.randn(4, 3, 2, 2)
    net = nn.Sequential(copy.deepcopy(layer))
    revert_to_batchnorm(net)
    assert isinstance(net[0], nn.BatchNorm2d)
    assert not isinstance(net[0], BatchRenorm2d)
    torch.testing.assert_close(net(x), layer(x))
    assert (type(net[0].drop), type(net[0].act)) == (nn.Dropout, nn.SiLU)
    convert_batchnorm(net)
    assert type(net[0]) is BatchRenormAct2d
    torch.testing.assert_close(net(x), layer(x))


def test_a_layer_of_sb3_contribs_class_stays_one() -> None:
    theirs = pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d
    net = convert_batchrenorm(nn.Sequential(trained(theirs(3), (8, 3))))
    x = torch.randn(8, 3)
    expected = net.eval()(x)
    revert_to_batchnorm(net)
    assert isinstance(net[0], nn.BatchNorm1d)
    assert not isinstance(net[0], BatchRenorm1d)
    assert isinstance(net[0], theirs)
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)
    assert set(net.state_dict()) == {"0.scale", "0.bias", "0.ra_mean", "0.ra_var", "0.steps"}
    net.load_state_dict(net.state_dict())
