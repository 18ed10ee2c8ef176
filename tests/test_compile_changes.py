"""torch.compile where things change: sizes, limits, modes; and compiled autograd over an eager forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from triton_brn import BatchRenorm2d, Ramp

LIMITS = {"plain": {"r_max": 1.0, "d_max": 0.0}, "clipped": {"r_max": 1.1, "d_max": 0.1}}


def network(limits: dict[str, Any]) -> nn.Module:
    norm = BatchRenorm2d(4, momentum=0.3, **limits)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Tanh())


def results(module: nn.Module, x: Tensor, compiler: Any = None) -> list[Tensor]:
    """Output, gradients and buffers after a step; the backward is compiled if there is a compiler."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    with (
        torch._dynamo.compiled_autograd._enable(compiler, dynamic=False) if compiler else torch.enable_grad()
    ):
        y.square().sum().backward()
    parameters = [p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *parameters, *(b.clone() for b in module.buffers())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("limits", LIMITS)
def test_compiled_autograd(limits: str, counter: Any, backend: str, device) -> None:
    plain = network(LIMITS[limits]).to(device)
    other = copy.deepcopy(plain)

    def compiler(graph: Any) -> Any:
        return torch.compile(graph, backend=counter, fullgraph=True, dynamic=False)

    for training in (True, True, False):
        x = torch.randn(4, 3, 3, 3, device=device) * 3 + 1
        plain.train(training), other.train(training)
        assert_same(results(other, x, compiler), results(plain, x))
    assert counter.frame_count == 2  # training and eval


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["marked", "seen"])
def test_sizes_that_change_are_one_graph(how: str, training: bool, counter: Any, eager: None, device) -> None:
    plain = network(LIMITS["clipped"]).to(device).train(training)
    other = copy.deepcopy(plain)
    fast = torch.compile(other, backend=counter, fullgraph=True)
    for batch, size in ((2, 4), (5, 6), (7, 9), (11, 5)):
        x = torch.randn(batch, 3, size, 4, device=device) * 3 + 1
        if how == "marked":
            for axis in (0, 2):
                torch._dynamo.mark_dynamic(x, axis)
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
        else:
            assert_same(results(fast, x), results(plain, x))
    torch.testing.assert_close(list(other.buffers()), list(plain.buffers()))
    assert counter.frame_count == (1 if how == "marked" else 2)  # the first size is taken for a constant


@torch._dynamo.config.patch(recompile_limit=32)  # by default, 8 graphs of a function
def test_what_changes_between_steps(counter: Any, eager: None, device) -> None:
    """Numbers are constants of a graph: another makes another graph. A Ramp serves all steps with one."""
    plain = network({}).to(device)
    other = copy.deepcopy(plain)
    fast = torch.compile(other, backend=counter, fullgraph=True)
    settings: list[dict[str, Any]] = [
        {"r_max": 2.0, "d_max": 1.0},
        {"r_max": 1.2, "d_max": 1.0},
        {"r_max": None, "d_max": None},
        {"r_max": Ramp(1.0, 3.0, 0, 10), "d_max": Ramp(0.0, 5.0, 0, 9)},
        {"momentum": None},
        {"eps": 1e-2},
    ]
    for setting in settings:
        for layer in (plain[1], other[1]):
            for name, value in setting.items():
                setattr(layer, name, value)
        counts = [counter.frame_count]
        for _ in range(3):
            x = torch.randn(4, 3, 3, 3, device=device) * 3 + 1
            assert_same(results(fast, x), results(plain, x))
            counts.append(counter.frame_count)
        assert counts[0] < counts[1] == counts[2] == counts[3]
    for layer in (plain[1], other[1]):
        layer.requires_grad_(False)
    assert_same(results(fast, x)[:4], results(plain, x)[:4])
    with torch.no_grad():
        assert_same([fast(x)], [plain(x)])
    assert_same([fast.eval()(x)], [plain.eval()(x)])
    assert_same(list(other.buffers()), list(plain.buffers()))
