"""What trains on several devices takes the layers: FSDP and its mixed precision, DDP, DataParallel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from triton_brn import BatchRenorm1d

LIMITS: dict[str, Any] = {"r_max": 3.0, "d_max": 5.0}
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture
def served(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type != "cpu":
        pytest.skip("gloo works on CPU tensors, which kernels serve in Triton's interpreter only")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize(("half", "original"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
def test_fsdp_with_mixed_precision(
    wrapped: bool, half: torch.dtype, original: bool, one_process: None, served: None
) -> None:
    """FSDP keeps every _BatchNorm in float32 where it wraps layers one by one; a whole model it casts,
    running statistics too."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    precision = MixedPrecision(param_dtype=half, buffer_dtype=half)
    model = nn.Sequential(nn.Linear(6, 4), BatchRenorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    layer = model[1]
    policy = ModuleWrapPolicy({nn.Linear}) if wrapped else None
    sharded = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        mixed_precision=precision,
        use_orig_params=original,
        auto_wrap_policy=policy,
    )
    seen = []
    layer.register_forward_hook(lambda layer, args, y: seen.append(args[0].dtype))
    x = torch.randn(8, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = sharded(x)
            y.float().square().sum().backward()
    said = [w for w in caught if "buffer_dtype=torch.float32" in str(w.message)]
    assert len(said) == (0 if wrapped else 1)
    assert y.dtype == half
    assert set(seen) == {torch.float32 if wrapped else half}
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.num_batches_tracked.item() == 2
    assert layer.running_mean.ne(0).all()
    if original:
        assert layer.weight.grad.dtype == torch.float32
    assert sharded.eval()(x).dtype == half
    assert sharded.state_dict()["1.running_var"].dtype == torch.float32


@needs_gloo
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
def test_fully_shard_with_mixed_precision(half: torch.dtype | None, one_process: None, served: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = nn.Sequential(nn.Linear(6, 4), BatchRenorm1d(4, **LIMITS), nn.ReLU(), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    x = torch.randn(8, 6)
    y, expected = model(x), plain(x)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-5 if half is None else 0.05)
    y.float().square().sum().backward()
    assert model[1].running_mean.dtype == torch.float32
    assert model[1].num_batches_tracked.item() == 1
    assert model[1].weight.grad is not None


@needs_gloo
def test_distributed_data_parallel_takes_the_layers(one_process: None, served: None) -> None:
    model = nn.Sequential(nn.Linear(6, 4), BatchRenorm1d(4, **LIMITS))
    plain = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(8, 6)
    for net in (parallel, plain):
        net(x).square().sum().backward()
        net(x + 1).square().sum().backward()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert torch.equal(model[1].weight.grad, plain[1].weight.grad)


def test_replicas_of_data_parallel_compute_the_same(eager: None) -> None:
    """Theirs are plain tensors, which are attributes instead of parameters."""
    layer = BatchRenorm1d(3, **LIMITS)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1)
    before = layer.running_mean.clone()
    y = replica(torch.randn(8, 3))
    y.square().sum().backward()
    assert layer.weight.grad.ne(0).all()
    assert layer.running_mean.ne(before).all(), "the first replica shares the buffers"
