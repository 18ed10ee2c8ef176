"""Networks that nobody here wrote train as with BatchNorm: `make zoo`, or pytest -m zoo.

With r_max=1 and d_max=0 batch renormalisation is batch normalisation: outputs, losses, gradients, weights
and running statistics of three SGD steps are BatchNorm's up to rounding, in float64.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, convert_batchnorm

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("eager")]
OURS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)
IMAGE = (4, 3, 64, 64)
BATCHNORM = {"norm": "batch"}
LIMIT = 1e-7
NETWORKS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    # name: where it is made, its arguments, the input's shape
    **{
        f"torchvision {name}": (f"torchvision.models.{name}", (), {"weights": None, **options}, shape)
        for name, options, shape in [
            ("resnet18", {}, IMAGE),
            ("resnet50", {}, IMAGE),
            ("resnext50_32x4d", {}, IMAGE),
            ("densenet121", {}, IMAGE),
            ("googlenet", {"init_weights": False}, IMAGE),
            ("inception_v3", {"init_weights": False, "aux_logits": False}, (4, 3, 139, 139)),
            ("mobilenet_v2", {}, IMAGE),
            ("mobilenet_v3_small", {}, IMAGE),
            ("mnasnet0_5", {}, IMAGE),
            ("efficientnet_b0", {}, IMAGE),
            ("regnet_y_400mf", {}, IMAGE),
            ("shufflenet_v2_x0_5", {}, IMAGE),
        ]
    },
    **{
        f"torchvision {name}": (
            f"torchvision.models.segmentation.{name}",
            (),
            {"weights": None, "weights_backbone": None},
            shape,
        )
        for name, shape in [
            ("fcn_resnet50", (4, 3, 32, 32)),
            ("deeplabv3_mobilenet_v3_large", IMAGE),
            ("lraspp_mobilenet_v3_large", IMAGE),
        ]
    },
    "torchvision r3d_18": ("torchvision.models.video.r3d_18", (), {"weights": None}, (2, 3, 4, 32, 32)),
    "torchvision resnet_fpn": (
        "torchvision.models.detection.backbone_utils.resnet_fpn_backbone",
        (),
        {"backbone_name": "resnet18", "weights": None, "norm_layer": nn.BatchNorm2d, "trainable_layers": 5},
        IMAGE,
    ),
    **{
        f"timm {name}": ("timm.create_model", (name,), {"pretrained": False}, IMAGE)
        for name in [
            "resnet18",
            "resnet50d",
            "seresnet18",
            "cspresnet50",
            "efficientnet_b0",
            "mobilenetv3_small_100",
            "regnetx_002",
            "repvgg_a0",
            "mobileone_s0",
            "dla34",
            "hrnet_w18_small",
            "ghostnet_050",
            "res2net50_14w_8s",
            "fastvit_t8",
        ]
    },
    "timm levit_128s": ("timm.create_model", ("levit_128s",), {"img_size": 64}, IMAGE),
    "timm convmixer": (
        "timm.models.convmixer.ConvMixer",
        (32, 4),
        {"kernel_size": 5, "patch_size": 4, "num_classes": 10},
        IMAGE,
    ),
    "MONAI UNet": (
        "monai.networks.nets.UNet",
        (2, 3, 2, (8, 16, 32), (2, 2)),
        {"num_res_units": 2, **BATCHNORM},
        IMAGE,
    ),
    "MONAI UNet 3-D": (
        "monai.networks.nets.UNet",
        (3, 1, 2, (4, 8, 16), (2, 2)),
        {"num_res_units": 2, **BATCHNORM},
        (2, 1, 16, 16, 16),
    ),
    "MONAI DynUNet": (
        "monai.networks.nets.DynUNet",
        (2, 3, 2, [3] * 3, [1, 2, 2], [2, 2]),
        {"filters": [8, 16, 32], "norm_name": "batch", "res_block": True, "deep_supervision": True}
        | {"deep_supr_num": 1},
        IMAGE,
    ),
    "MONAI SegResNet": ("monai.networks.nets.SegResNet", (2, 8, 3, 2), {"norm": "batch"}, IMAGE),
    "MONAI AttentionUnet": (
        "monai.networks.nets.AttentionUnet",
        (2, 3, 2, (8, 16, 32), (2, 2)),
        {},
        IMAGE,
    ),
    "MONAI DenseNet121": ("monai.networks.nets.DenseNet121", (2, 3, 10), {}, IMAGE),
    "MONAI ResNet 3-D": (
        "monai.networks.nets.ResNet",
        ("basic", [1, 1, 1, 1], [8, 16, 24, 32]),
        {"spatial_dims": 3, "n_input_channels": 1},
        (4, 1, 32, 32, 32),
    ),
    **{
        f"smp {name}": (
            f"segmentation_models_pytorch.{name}",
            ("resnet18",),
            {"encoder_weights": None, **options},
            IMAGE,
        )
        for name, options in [
            ("Unet", {}),
            ("FPN", {}),
            ("Linknet", {}),
            ("PSPNet", {}),
            ("DeepLabV3Plus", {}),
            ("MAnet", {}),
        ]
    },
}


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network with new weights and its input's shape."""
    path, arguments, options, shape = NETWORKS[name]
    pytest.importorskip(path.split(".")[0], reason=f"{name} was not trained: it needs {path.split('.')[0]}")
    module, function = path.rsplit(".", 1)
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), function)(*arguments, **options).train()
    return model, shape


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers that are torch's own or a subclass of another package, by name."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, batch_norm) and not isinstance(m, OURS)}


def converted(model: nn.Module, **options: Any) -> nn.Module:
    """A converted copy: each layer of ours keeps the momentum of the BatchNorm it replaces."""
    new = convert_batchnorm(copy.deepcopy(model), running_average="var", **options)
    for name, norm in norms(model).items():
        layer = new.get_submodule(name)
        assert isinstance(layer, OURS), f"{name}, {type(norm).__name__}, was not converted"
        layer.momentum = norm.momentum
    return new


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a network returns."""
    if isinstance(output, Tensor):
        yield output
    elif output is not None:
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def train(
    model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """SGD towards 1 for every output; after each step what was computed, and the new state."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    for step, x in enumerate(batches):
        torch.manual_seed(step)  # of dropout
        optimizer.zero_grad()
        outputs = list(tensors(model(x)))
        loss = sum((out - 1).square().mean() for out in outputs)
        loss.backward()
        optimizer.step()
        yield {
            "loss": [loss.detach()],
            "outputs": [out.detach() for out in outputs],
            "gradients": [p.grad for p in model.parameters() if p.grad is not None],
            "parameters": [p.detach() for p in model.parameters()],
            "buffers": [b for b in model.buffers() if b.is_floating_point()],
            "counters": [b for b in model.buffers() if not b.is_floating_point()],
        }


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to its tensor's largest value.

    Where that is 1e-5 of the largest of all it is rounding, as of the gradient of a bias that a
    norm follows: then the difference is relative to that.
    """
    largest = [t.abs().max().item() for t in theirs]
    return max(
        (
            (a - b).abs().max().item() / max(value, 1e-5 * max(largest))
            for a, b, value in zip(ours, theirs, largest, strict=True)
        ),
        default=0.0,
    )


def assert_trains_alike(ours: nn.Module, theirs: nn.Module, batches: list[Tensor]) -> None:
    """Three steps are equal up to rounding, which last maps of few elements make 100 times larger a step."""
    for step, (a, b) in enumerate(zip(train(ours, batches), train(theirs, batches), strict=True)):
        for what in b:
            assert difference(a[what], b[what]) < LIMIT, f"{what} of step {step}"
        assert len(b["counters"]) == 0 or all(map(torch.equal, a["counters"], b["counters"]))


@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps_are_those_of_batch_norm(name: str) -> None:
    model, shape = make(name)
    model = model.double()
    batches = list(torch.randn(3, *shape, dtype=torch.float64))
    assert_trains_alike(converted(model, r_max=1.0, d_max=0.0), model, batches)


@pytest.mark.parametrize("name", ["torchvision mobilenet_v3_small", "timm seresnet18", "smp Unet"])
def test_three_steps_in_channels_last(name: str) -> None:
    model, shape = make(name)
    model = model.double().to(memory_format=torch.channels_last)
    batches = [x.to(memory_format=torch.channels_last) for x in torch.randn(3, *shape, dtype=torch.float64)]
    assert_trains_alike(converted(model, r_max=1.0, d_max=0.0), model, batches)


@pytest.mark.parametrize(
    "name",
    ["torchvision resnet18", "torchvision shufflenet_v2_x0_5", "timm resnet50d", "MONAI DynUNet", "smp FPN"],
)
def test_it_learns_in_float32_with_r_and_d(name: str) -> None:
    model, shape = make(name)
    model = converted(model, r_max=3.0, d_max=5.0)
    for layer in model.modules():
        if isinstance(layer, OURS):
            layer.momentum = 0.1
    adam = torch.optim.Adam(model.parameters(), 0.001)
    steps = list(train(model, [torch.randn(shape)] * 6, adam))
    losses = [step["loss"][0].item() for step in steps]
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(t.isfinite().all() for t in [*steps[-1]["parameters"], *steps[-1]["buffers"]])
    with torch.no_grad():
        assert all(out.isfinite().all() for out in tensors(model.eval()(torch.randn(shape))))


def test_a_compiled_network_trains_like_an_eager_one() -> None:
    model, shape = make("timm convmixer")
    model = converted(model.double(), r_max=3.0, d_max=5.0)
    batches = list(torch.randn(3, *shape, dtype=torch.float64))
    assert_trains_alike(torch.compile(copy.deepcopy(model), fullgraph=True), model, batches)


@pytest.mark.parametrize("name", ["timm resnet18", "timm efficientnet_b0", "torchvision densenet121"])
def test_checkpointing_changes_nothing(name: str) -> None:
    """Gradients are the plain run's, and the statistics are updated once."""
    model, shape = make(name)
    model = converted(model.double(), r_max=3.0, d_max=5.0)
    saving = copy.deepcopy(model)
    if name.startswith("timm"):
        saving.set_grad_checkpointing()
    else:
        for part in saving.modules():
            if hasattr(part, "memory_efficient"):
                part.memory_efficient = True
    assert_trains_alike(saving, model, list(torch.randn(3, *shape, dtype=torch.float64)))


def test_frozen_layers_stay_as_they_are() -> None:
    """torchvision's detection backbones have FrozenBatchNorm2d, which is no BatchNorm."""
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.FrozenBatchNorm2d
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=frozen
    )
    count = sum(isinstance(m, frozen) for m in backbone.modules())
    assert count == 20
    model = converted(nn.ModuleDict({"backbone": backbone, "head": nn.BatchNorm2d(256)}))
    assert isinstance(model["head"], BatchRenorm2d)
    assert sum(isinstance(m, frozen) for m in model.modules()) == count


@pytest.mark.parametrize("name", ["nf_resnet26", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_network_without_batch_norm_is_refused(name: str) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="BatchNorm"):
        convert_batchnorm(timm.create_model(name))
