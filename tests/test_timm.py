"""timm's networks with our layers: built with norm_layer=, converted, frozen, reverted."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from triton_brn import (
    BatchRenorm2d,
    BatchRenormAct2d,
    activated,
    convert_batchnorm,
    revert_to_batchnorm,
)

timm = pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.usefixtures("eager")

ROOT = Path(__file__).parents[1]


def kinds(net: nn.Module) -> set[type]:
    return {type(m) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def created(name: str, **options: Any) -> Any:
    return timm.create_model(name, num_classes=3, **options)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def trained(net: nn.Module) -> nn.Module:
    net.train()
    with torch.no_grad():
        net(images())
    return net.eval()


@pytest.mark.parametrize("layer", [BatchRenorm2d, BatchRenormAct2d])
@pytest.mark.parametrize("name", ["efficientnet_b0", "regnetx_002", "densenet121", "repvgg_a0"])
def test_norm_act_networks_are_built_of_ours(name: str, layer: type) -> None:
    net = created(name, norm_layer=partial(layer, r_max=2.0))
    assert BatchRenormAct2d in kinds(net)
    assert kinds(net) <= {BatchRenormAct2d, BatchRenorm2d}
    assert {m.r_max for m in net.modules() if isinstance(m, BatchRenorm2d)} == {2.0}
    like = created(name)
    like.load_state_dict(net.state_dict())
    x = images()
    torch.testing.assert_close(net.eval()(x), like.eval()(x))
    net.train()(x).sum().backward()


def test_networks_of_norms_without_an_activation_are_built_of_ours() -> None:
    net, like = created("resnet18", norm_layer=BatchRenorm2d), created("resnet18")
    assert kinds(net) == {BatchRenorm2d}
    like.load_state_dict(net.state_dict())
    x = images()
    torch.testing.assert_close(net.eval()(x), like.eval()(x))


def test_timms_own_tables_are_as_before() -> None:
    layer = timm.layers.create_norm_act.get_norm_act_layer(nn.BatchNorm2d, "silu")(3)
    assert type(layer) is timm.layers.BatchNormAct2d
    assert type(layer.act) is nn.SiLU
    for ours in (BatchRenorm2d, BatchRenormAct2d, partial(BatchRenorm2d, eps=1e-3)):
        made = timm.layers.create_norm_act_layer(ours, 3, act_layer="silu", apply_act=True)
        assert (type(made), type(made.act)) == (BatchRenormAct2d, nn.SiLU)
        made = timm.layers.get_norm_act_layer(ours)(3)
        assert type(made.act) is nn.Identity, "timm's act_layer=None"


def test_arguments_are_those_of_timms_layer() -> None:
    theirs, ours = (
        list(inspect.signature(k).parameters) for k in (timm.layers.BatchNormAct2d, BatchRenormAct2d)
    )
    assert ours[: len(theirs)] == theirs
    assert BatchRenormAct2d(3, act_layer="hard_mish").act is not None, "a name that only timm knows"
    with pytest.raises(ValueError, match=r"got 'rleu'$"):
        BatchRenormAct2d(3, act_layer="rleu")


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "resnet18", "repvgg_a0"])
def test_there_and_back(name: str) -> None:
    net = trained(created(name))
    x, before = images(), kinds(net)
    expected, state = net(x), list(net.state_dict())
    convert_batchnorm(net)
    assert kinds(net) <= {BatchRenorm2d, BatchRenormAct2d}
    torch.testing.assert_close(net(x), expected)
    assert list(net.state_dict()) == state
    revert_to_batchnorm(net)
    assert kinds(net) == before
    torch.testing.assert_close(net(x), expected)


def test_what_timm_does_with_its_norm_act_layers_keeps_the_activation() -> None:
    norm_act = timm.layers.norm_act
    net = trained(convert_batchnorm(created("efficientnet_b0")))
    x = images()
    expected = net(x)
    synced = norm_act.convert_sync_batchnorm(net)
    assert norm_act.SyncBatchNormAct in kinds(synced)
    torch.testing.assert_close(synced(x), expected)
    convert_batchnorm(synced)
    assert kinds(synced) == {BatchRenormAct2d}
    torch.testing.assert_close(synced(x), expected)
    frozen = norm_act.freeze_batch_norm_2d(synced)
    assert not kinds(frozen)
    torch.testing.assert_close(frozen.train()(x), expected)


SCRIPT = """
import sys
import torch
sys.path.insert(0, "examples")
import torchvision_schemas
torchvision_schemas.declare()
{}
layer = timm.layers.get_norm_act_layer(triton_brn.BatchRenorm2d, "relu")(3)
assert type(layer) is triton_brn.BatchRenormAct2d and isinstance(layer, timm.layers.BatchNormAct2d)
assert not [f for f in sys.meta_path if type(f).__module__.startswith("triton_brn")]
assert layer(torch.randn(2, 3, 4, 4)).min() == 0
print("fine")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import timm; import triton_brn",
        "import triton_brn; assert 'timm' not in sys.modules; old = triton_brn.BatchRenormAct2d(3); "
        "import timm; assert isinstance(old, timm.layers.BatchNormAct2d)",
    ],
)
def test_either_may_be_imported_first(imports: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(imports)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def test_other_tables_than_we_know_are_told(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers.create_norm_act", types.ModuleType("create_norm_act"))
    with caplog.at_level(logging.WARNING):
        activated._join_timm(timm.layers)
    assert "norm_layer= of this timm will not take ours" in caplog.text
