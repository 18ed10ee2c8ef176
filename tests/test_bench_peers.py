"""The contestants of the benchmark: that they compute what is compared."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from reference import (
    assert_accurate,
    batch_renorm_reference,
    inference_reference,
    inputs,
    reference_gradients,
)
from torch import nn

from triton_brn import _bench_peers
from triton_brn._bench_cases import DIRECTIONS, Case

pytestmark = pytest.mark.usefixtures("eager")
SMALL = Case((4, 6, 5, 5))


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3, 3)])
def test_plain_version_is_algorithm_1(shape):
    layer = _bench_peers.EagerBatchRenorm(5)
    x = torch.randn(shape) * 3 + 1
    expected = batch_renorm_reference(x, torch.zeros(5), torch.ones(5) - 1e-5)
    torch.testing.assert_close(layer(x).double(), expected.y, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.double(), expected.running_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        layer.running_std.double(), (expected.running_var + 1e-5).sqrt(), rtol=0, atol=1e-6
    )


def test_layers_for_rows_get_the_maps_statistics():
    x = torch.randn(4, 5, 3, 3)
    expected = nn.BatchNorm2d(5)(x)
    for form in (torch.contiguous_format, torch.channels_last):
        y = _bench_peers.OnRows(nn.BatchNorm1d(5))(x.contiguous(memory_format=form))
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(4096, 9), (256, 9, 16), (16, 9, 16, 16)])
def test_sb3_contrib_is_algorithm_1_but_for_the_unbiased_variance(shape):
    """Its eps is also added elsewhere: after the division by r's square."""
    peer = next(p for p in _bench_peers.peers("cpu") if p.name == "sb3-contrib")
    if peer.missing:
        pytest.skip(f"sb3-contrib: {peer.missing}")
    case = inputs(shape, torch.float64)
    layer = peer.make(shape, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        for mine, value in (
            ("ra_mean", case.running_mean),
            ("ra_var", case.running_var),
            ("scale", case.weight),
            ("bias", case.bias),
        ):
            getattr(layer.layer, mine).copy_(value)
    expected = inference_reference(*case.args)
    with torch.no_grad():
        assert_accurate(layer.eval()(case.x), expected)

    x = case.x.requires_grad_()
    y = layer.train()(x)
    grads = torch.autograd.grad(y, [x, layer.layer.scale, layer.layer.bias], case.dy)
    expected = batch_renorm_reference(*case.args, average="var")
    assert_accurate(y, expected.y, 3e-4)
    assert_accurate(layer.layer.ra_mean, expected.running_mean)
    assert_accurate(layer.layer.ra_var, expected.running_var)
    for grad, value in zip(grads, reference_gradients(case.dy, *case.args), strict=True):
        assert_accurate(grad, value, 3e-4, scale=value.abs().max())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_calls_do_what_their_direction_says(direction):
    x, dy = SMALL.tensors(torch.device("cpu"))
    layer = _bench_peers.batch_renorm(SMALL.shape)
    call = _bench_peers.call_of(layer, x, dy, direction)
    before = int(layer.num_batches_tracked)
    found = [call(), call()][1]
    assert int(layer.num_batches_tracked) - before == (2 if direction in ("forward", "both") else 0)
    if direction in ("backward", "both"):
        assert [g.shape for g in found] == [x.shape, (6,), (6,)]
    else:
        assert found.shape == x.shape
        assert found.requires_grad == (direction == "forward")
    assert x.grad is None


def test_a_contestants_package_is_named_with_its_version():
    versions = {peer.name: peer.version for peer in _bench_peers.peers("cpu")}
    installed = {p.name for p in _bench_peers.peers("cpu") if p.package and not p.missing}
    for name in installed:
        assert versions[name] == f"{name} {importlib.metadata.version(name)}"
    assert versions[_bench_peers.OURS] == versions["BatchNorm"] == ""
    pytest_as_peer = _bench_peers.Peer("pytest", _bench_peers.batch_norm, package="pytest")
    assert pytest_as_peer.version == f"pytest {pytest.__version__}"
    sources = _bench_peers.Peer("bench", _bench_peers.batch_norm, package="no_such_package")
    assert sources.version == "bench, version unknown"
