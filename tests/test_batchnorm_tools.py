"""Tools that look for BatchNorm, torch's and other people's, do to the layers what they do to it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from reference import assert_accurate, from_case, inputs
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Ramp, convert_batchnorm

LIMITS: dict[str, Any] = {"r_max": 3.0, "d_max": 5.0}


def trained(layer: nn.Module) -> nn.Module:
    """``layer`` with statistics and parameters that are not those of a new one."""
    for name, t in layer.state_dict().items():
        if t.is_floating_point() and t.ndim == 1:
            t.uniform_(0.5, 2.0) if name.endswith(("weight", "_var")) else t.normal_()
    return layer


def network(norm: type = BatchRenorm2d, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(), nn.Conv2d(4, 5, 2), norm(5, **options)
    )


# Weight averaging


def averaged_by_hand(batches: list[Tensor], average: str) -> tuple[Tensor, Tensor]:
    """The mean over batches of their means, and of their standard deviations or unbiased variances."""
    rows = [x.double().movedim(1, -1).flatten(0, -2) for x in batches]
    var = torch.stack([x.var(0, correction=int(average == "var")) for x in rows])
    mean = torch.stack([x.mean(0) for x in rows]).mean(0)
    return mean, (var + 1e-5).sqrt().mean(0) ** 2 - 1e-5 if average == "std" else var.mean(0)


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("limits", [{}, LIMITS, {"r_max": None, "d_max": None}])
def test_update_bn_gives_cumulative_averages(limits: dict, average: str, backend: str, device) -> None:
    layers = nn.Sequential(
        *(BatchRenorm1d(3, **limits, running_average=average) for _ in range(2)), nn.ReLU()
    )
    layers = trained(layers).to(device).eval()
    batches = [torch.randn(6, 3, device=device) * scale + 9 for scale in (1, 2, 4)]
    swa_utils.update_bn(([x, "target"] for x in batches), layers)
    mean, var = averaged_by_hand(batches, average)
    assert_accurate(layers[0].running_mean, mean)
    assert_accurate(layers[0].running_var, var)
    assert [layer.num_batches_tracked.item() for layer in layers[:2]] == [3, 3]
    assert [layer.momentum for layer in layers[:2]] == [0.01, 0.01]
    assert not layers.training


def test_update_bn_serves_deep_networks_whatever_the_limits(eager: None) -> None:
    """A first batch that is corrected towards mean 0, variance 1 leaves its traces in all deeper layers."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    model = nn.Sequential(*layers)
    batches = [torch.randn(8, 3, 6, 6) * 5 + 9 for _ in range(12)]
    swa_utils.update_bn(batches, model)
    ours = convert_batchnorm(copy.deepcopy(model), **LIMITS)
    swa_utils.update_bn(batches, ours)
    y, expected = (m.eval()(batches[0]) for m in (ours, model))
    assert (y - expected).norm() < 0.15 * (expected - expected.mean((0, 2, 3), keepdim=True)).norm()


def test_the_first_of_cumulative_averages_is_not_corrected(backend: str, device) -> None:
    x = torch.randn(8, 3, device=device) * 4 + 2
    for limits in (LIMITS, {"r_max": None, "d_max": None}, {"r_max": 2, "d_max": Ramp(0.0, 3.0, 0, 1)}):
        layer = BatchRenorm1d(3, momentum=None, **limits).to(device)
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(3).to(device)(x), rtol=0, atol=2e-6)
        second = layer(x + 1)
        fixed = BatchRenorm1d(3, momentum=0.5, **limits | {"d_max": limits["d_max"] and 3}).to(device)
        fixed.load_state_dict(BatchRenorm1d(3).state_dict())
        fixed.running_mean.copy_(x.mean(0))
        fixed.running_var.copy_(x.var(0, correction=0))
        torch.testing.assert_close(second, fixed(x + 1), rtol=0, atol=5e-6)


def test_averaged_models_average_the_statistics(eager: None) -> None:
    model = network()
    average = swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
        average.update_parameters(model)
    assert average.module[1].running_mean.ne(0).all()
    assert average.module[1].num_batches_tracked.dtype == torch.int64
    assert average(torch.randn(4, 3, 8, 8)).isfinite().all()


def test_the_averaging_callback_of_lightning(eager: None) -> None:
    """What StochasticWeightAveraging does: statistics anew, one pass in training with momentum=None."""
    model = network(**LIMITS)
    momenta = {}
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, value in (("running_mean", 0), ("running_var", 1)):
            old = getattr(module, name)
            setattr(module, name, torch.full_like(old, value, dtype=old.dtype, device=old.device))
        momenta[module] = module.momentum
        module.momentum = None
        module.num_batches_tracked *= 0
    assert len(momenta) == 2
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    for x in batches:
        model(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    mean, var = averaged_by_hand([model[0](x) for x in batches], "std")
    assert_accurate(model[1].running_mean, mean.detach(), scale=mean.abs().max())
    assert_accurate(model[1].running_var, var.detach())


def test_precise_statistics_by_a_momentum_of_one(backend: str, device) -> None:
    """fvcore's and mmcv's update_bn_stats read each batch's statistics off layers of momentum 1."""
    layer = trained(BatchRenorm1d(3, running_average="var", **LIMITS)).to(device)
    layer.momentum = 1.0
    for _ in range(2):
        x = torch.randn(6, 3, device=device) * 3 + 1
        layer(x)
        assert_accurate(layer.running_mean, x.double().mean(0), scale=x.abs().max())
        assert_accurate(layer.running_var, x.double().var(0))


# Freezing


def test_finetuning_callbacks_of_lightning_freeze(eager: None) -> None:
    """BaseFinetuning.freeze: ``track_running_stats`` of layers in training goes off, parameters freeze."""
    model = trained(network(**LIMITS))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert not model.train()(x).requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for module in model.modules():  # make_trainable, unfreeze
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = True
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = True
    model(x).sum().backward()
    assert model[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("average", ["std", "var"])
def test_without_tracking_training_changes_no_statistics(
    momentum: float | None, average: str, backend: str, device
) -> None:
    case = inputs((8, 3), device=device)
    options: dict[str, Any] = {"momentum": momentum, "running_average": average}
    ramps = {"r_max": Ramp(1.0, 3.0, 0, 10), "d_max": Ramp(0.0, 5.0, 0, 10)}
    layer, plain = (from_case(BatchRenorm1d(3, **ramps, **options), case) for _ in range(2))
    layer.num_batches_tracked.fill_(6)
    plain.num_batches_tracked.fill_(6)
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats ^= True  # as virtual adversarial training toggles it
    x, z = (case.x.clone().requires_grad_() for _ in range(2))
    y = layer(x)
    y.backward(case.dy)
    expected = plain(z)
    expected.backward(case.dy)
    assert torch.equal(y, expected), "the normalisation is that of training"
    assert torch.equal(x.grad, z.grad)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.reset_running_stats()  # torch's does nothing then
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    for use_reentrant in (True, False):
        z = case.x.clone().requires_grad_()
        checkpoint(layer, z, use_reentrant=use_reentrant).backward(case.dy)
        assert torch.equal(x.grad, z.grad)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert "track_running_stats=False" in repr(layer)
    y = layer.eval()(case.x)
    layer.track_running_stats ^= True
    assert torch.equal(y, layer(case.x))
    layer.train()(case.x)
    assert layer.num_batches_tracked.item() == 7


def test_norm_eval_loops_of_mmcv(eager: None) -> None:
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> Backbone:
            super().train(mode)
            if mode:
                for m in self.modules():
                    if isinstance(m, nn.modules.batchnorm._BatchNorm):
                        m.eval()
            return self

    model = Backbone(*network(**LIMITS)).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    assert y.requires_grad
    assert torch.equal(y, model.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_timm_freezes_and_unfreezes(eager: None) -> None:
    _torchvision()
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    model = trained(network(**LIMITS)).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    frozen = layers.freeze_batch_norm_2d(model)
    assert not [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(frozen.train()(x), expected, rtol=0, atol=1e-5)
    thawed = layers.unfreeze_batch_norm_2d(frozen)
    assert [type(m) for m in thawed[1::3]] == [nn.BatchNorm2d, nn.BatchNorm2d]
    torch.testing.assert_close(thawed.eval()(x), expected, rtol=0, atol=1e-5)


def _torchvision() -> Any:
    """torchvision; where its C++ operators do not load, with the two schemas that its import asks for."""
    for name in ("nms", "qnms"):
        try:
            torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "Meta")
        except RuntimeError:
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            _LIBRARIES[-1].define(name + schema)
    return pytest.importorskip("torchvision", reason="torchvision is not installed")


_LIBRARIES: list[torch.library.Library] = []


# Parameter groups, initialisation


def test_torchvision_finds_the_parameters_of_normalisations() -> None:
    _torchvision()
    from torchvision.ops._utils import split_normalization_params

    model = network()
    norms, others = split_normalization_params(model)
    assert [id(p) for p in norms] == [id(p) for p in (*model[1].parameters(), *model[4].parameters())]
    assert len(others) == 4


def test_initialisation_loops_find_the_layers() -> None:
    model = nn.Sequential(
        BatchRenorm1d(3), BatchRenorm2d(3), BatchRenorm3d(3), BatchRenorm2d(3, affine=False)
    )
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and m.affine:
            nn.init.constant_(m.weight, 0)
            nn.init.constant_(m.bias, 0.5)
    assert [p.mean().item() for p in model.parameters()] == [0, 0.5] * 3


# Folding and replacing


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("before", "norm", "shape"),
    [
        (nn.Linear(4, 3), BatchRenorm1d, (5, 4)),
        (nn.Conv1d(4, 3, 2, bias=False), BatchRenorm1d, (5, 4, 6)),
        (nn.Conv2d(4, 3, 2), BatchRenorm2d, (5, 4, 6, 5)),
        (nn.Conv3d(4, 3, 2), BatchRenorm3d, (2, 4, 3, 4, 3)),
        (nn.ConvTranspose2d(4, 3, 2), BatchRenorm2d, (5, 4, 6, 5)),
    ],
)
def test_eval_layers_fold_into_what_is_before(
    before: nn.Module, norm: type, shape: tuple, affine: bool, eager: None
) -> None:
    linear = isinstance(before, nn.Linear)  # torch folds only layers with a weight into one
    layer = trained(norm(3, affine=affine or linear, **LIMITS)).eval()
    if linear:
        folded = nn.utils.fusion.fuse_linear_bn_eval(before.eval(), layer)
    else:
        transposed = isinstance(before, nn.ConvTranspose2d)
        folded = nn.utils.fusion.fuse_conv_bn_eval(before.eval(), layer, transpose=transposed)
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), layer(before(x)), rtol=0, atol=1e-5)


def test_mkldnn_takes_the_layers(eager: None) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    from torch.utils import mkldnn

    model = trained(network(**LIMITS)).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        y = mkldnn.to_mkldnn(copy.deepcopy(model))(x.to_mkldnn()).to_dense()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_syncbatchnorm_takes_their_place(bias: bool) -> None:
    """The docstring says so: it is what happens to every BatchNorm."""
    model = trained(network(bias=bias))
    ours = copy.deepcopy(model.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in synced[1::3]] == [nn.SyncBatchNorm] * 2
    assert all(torch.equal(v, ours[k]) for k, v in synced.state_dict().items())
    assert "SyncBatchNorm" in (BatchRenorm2d.__doc__ or "")


@pytest.mark.parametrize("training", [True, False])
def test_without_statistics_it_is_batch_norm(training: bool, backend: str, device) -> None:
    """torch.func.replace_all_batch_norm_modules_ takes running statistics away."""
    ours, theirs = network(**LIMITS).to(device), network(nn.BatchNorm2d).to(device)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        torch.func.replace_all_batch_norm_modules_(model.train(training))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(4, 3, 8, 8, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    samples = torch.randn(3, 4, 3, 8, 8, device=device)
    y = torch.vmap(ours)(samples)
    torch.testing.assert_close(y, torch.stack([ours(s) for s in samples]), rtol=0, atol=1e-5)
