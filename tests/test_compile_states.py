"""torch.compile takes the layers in the less common states that their forward serves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from triton_brn import BatchRenorm1d

pytestmark = pytest.mark.usefixtures("eager")


def layer(**options: object) -> BatchRenorm1d:
    torch.manual_seed(1)
    made = BatchRenorm1d(3, **{"r_max": 3.0, "d_max": 5.0} | options)  # type: ignore[arg-type]
    nn.init.uniform_(made.running_var, 0.5, 2.0)
    return made


def untracked() -> nn.Module:
    made = layer()
    made.track_running_stats = False
    return made


def parametrized() -> nn.Module:
    made = layer()
    parametrize.register_parametrization(made, "weight", nn.Softplus())
    parametrize.register_parametrization(made, "running_mean", nn.Identity())
    return made


STATES: dict[str, Callable[[], nn.Module]] = {
    "cumulative averages": lambda: layer(momentum=None),
    "cumulative averages, no limits": lambda: layer(momentum=None, r_max=None, d_max=None),
    "without a bias": lambda: layer(bias=False),
    "untracked": untracked,
    "without statistics": lambda: torch.func.replace_all_batch_norm_modules_(layer()),
    "pruned": lambda: prune.l1_unstructured(layer(), "weight", 1),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_compiled_it_computes_the_same(make: Callable[[], nn.Module]) -> None:
    plain, model = make(), make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(6, 3) * 2 + 1
        z = x.clone().requires_grad_()
        y, expected = compiled(z), plain(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        y.sum().backward()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:running statistics in torch.float16")
def test_compiled_it_restores_statistics_in_half_precision() -> None:
    model = layer()
    for statistics in (model.running_mean, model.running_var):
        statistics.data = statistics.data.half()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 3)
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=2e-6)
    assert model.running_mean.dtype == model.running_var.dtype == torch.float32
    assert torch.equal(model.running_var, plain.running_var)
