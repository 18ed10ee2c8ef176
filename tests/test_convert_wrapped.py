"""Models that are compiled, or wrapped for several devices or processes, are converted within."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn

from triton_brn import BatchRenorm2d, convert_batchnorm, revert_to_batchnorm

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("wrap", [torch.compile, lambda net, **options: net.compile(**options) or net])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("back", [False, True])
def test_compiled_models_run_the_new_layers(wrap: Callable[..., Any], itself: bool, back: bool) -> None:
    torch._dynamo.reset()
    norm = nn.BatchNorm2d(3)
    net = wrap(norm if itself else nn.Sequential(norm), backend="eager")
    x = torch.randn(4, 3, 5, 5)
    net(x)
    convert_batchnorm(nn.Sequential(net), r_max=1.0, d_max=4.0, momentum=0.1, running_average="var")
    assert not torch.allclose(net(x), nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True))
    if back:
        revert_to_batchnorm(nn.Sequential(net))
        torch.testing.assert_close(
            net(x), nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True)
        )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrapped_models_are_converted_within(wrap: Callable[..., nn.Module]) -> None:
    net = wrap(nn.Sequential(nn.BatchNorm2d(3)))
    assert convert_batchnorm(net) is net
    assert type(net.module[0]) is BatchRenorm2d
    assert net(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_graphs_of_torch_fx_are_converted() -> None:
    graph = torch.fx.symbolic_trace(small())
    x = torch.randn(2, 3, 4, 4)
    expected = graph(x)
    convert_batchnorm(graph, r_max=1.0, d_max=0.0)
    torch.testing.assert_close(graph(x), expected)
    assert type(graph.get_submodule("1")) is BatchRenorm2d


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def steps(net: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.linspace(-2, 3, 300).reshape(4, 3, 5, 5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("kind", ["DDP", "FSDP", "FSDP of original parameters", "fully_shard"])
@pytest.mark.usefixtures("process_group")
def test_models_of_several_processes_are_converted_within(kind: str) -> None:
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    expected, net = steps(small()), small()
    norm = net[1]
    if kind == "DDP":
        net = nn.parallel.DistributedDataParallel(net)
    elif kind == "fully_shard":
        fsdp.fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    else:
        original = kind == "FSDP of original parameters"
        net = fsdp.FullyShardedDataParallel(net, use_orig_params=original, device_id=torch.device("cpu"))
    convert_batchnorm(net, r_max=1.0, d_max=0.0)
    assert type(norm) is BatchRenorm2d
    torch.testing.assert_close(steps(net), expected)
    assert norm.num_batches_tracked == 3


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.usefixtures("process_group")
def test_a_layer_that_is_sharded_by_itself_is_left() -> None:
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    net = small()
    fsdp.fully_shard(net[1], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="1: FSDPBatchNorm2d, sharded by itself: convert before fully_shard"):
        convert_batchnorm(net)
