"""What follows a layer in real networks writes into its output: ``out += shortcut``, ReLU(inplace=True)."""

from __future__ import annotations

import pytest
import torch
from reference import LAYOUTS, ODD_LAYOUTS, lay_out
from torch import Tensor, nn

from triton_brn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, batch_renorm

LAYERS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
TINY = [(4, 3), (2, 3, 5), (2, 3, 2, 2)]  # for the kernels, whose interpreter is slow
SMALL = [(8, 6), (4, 6, 5), (2, 6, 4, 4), (2, 6, 3, 2, 2), (1, 1, 4, 4)]
# On both sides of what plain PyTorch decides by: 65,536 elements; of (N, C), 262,144 and 128 channels.
LARGE = [
    (2, 64, 31, 33),
    (2, 64, 32, 32),
    (33, 64, 30),
    (32, 64, 32),
    (1, 1, 4, 128, 128),
    (2, 64, 8, 8, 8),
    (2047, 128),
    (2048, 128),
]
SHAPES = [(s, "eager") for s in SMALL + LARGE] + [(s, "triton") for s in TINY]


@pytest.fixture(params=SHAPES, ids=lambda p: f"{p[1]}-{'x'.join(map(str, p[0]))}")
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    shape, backend = request.param
    monkeypatch.setenv("TRITON_BRN_BACKEND", backend)
    return shape


def follow(y: Tensor, shortcut: Tensor, s: float) -> list[Tensor]:
    """What is done to y, without writing into it."""
    added = y + shortcut
    scaled = added * s
    return [added, scaled, scaled.relu()]


def follow_in_place(y: Tensor, shortcut: Tensor, s: float) -> list[Tensor]:
    steps = []
    y += shortcut
    steps.append(y.detach().clone())
    y *= s
    steps.append(y.detach().clone())
    nn.functional.relu_(nn.functional.dropout(y, 0.0, inplace=True))
    return [*steps, y]


@pytest.mark.parametrize("limits", [{}, {"r_max": 3.0, "d_max": 5.0}], ids=["new", "corrects"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_output_may_be_written_to(shape: tuple[int, ...], mode: str, limits: dict, device) -> None:
    layer = LAYERS[len(shape)](shape[1], **limits).to(device).train(mode == "train")
    for layout in (*LAYOUTS, *ODD_LAYOUTS) if shape not in LARGE else LAYOUTS:
        x, shortcut = (lay_out(torch.randn(shape, device=device) * 2 + 1, layout) for _ in range(2))
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        results = []
        for after in (follow, follow_in_place):
            layer.load_state_dict(state)
            leaf = x.detach().requires_grad_()
            y = layer(leaf)
            assert not y._is_view()
            steps = after(y, shortcut, 1.5)
            inputs = [leaf, layer.weight, layer.bias]
            grads = torch.autograd.grad(steps[-1], inputs, shortcut)
            assert not any(g._is_view() for g in grads)
            layer.load_state_dict(state)
            with torch.no_grad():
                y = layer(x)
                assert not y._is_view()
                steps += after(y, shortcut, 1.5)
            results.append([*steps, *grads])
        for plain, in_place in zip(*results, strict=True):
            assert torch.equal(plain, in_place)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_of_every_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, far: bool, training: bool, device
) -> None:
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape, device=device) + far * 1e4).to(dtype).requires_grad_()
    mean, var = (v(shape[1], device=device, dtype=stats) for v in (torch.zeros, torch.ones))
    y = batch_renorm(x, mean, var, training=training)
    assert not y._is_view()
    expected = (y * 2).relu()
    assert torch.equal(y.mul_(2).relu_(), expected)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not dx._is_view()
    assert not batch_renorm(x[:0], mean, var, training=training)._is_view()


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_a_network(shape: tuple[int, ...], training: bool, device) -> None:
    """Every layer is followed by something that writes into what it gave."""
    make = LAYERS[len(shape)]
    block = nn.Sequential(
        make(shape[1]),
        nn.ReLU(inplace=True),
        make(shape[1]),
        nn.Dropout(0.5, inplace=True),
        nn.ELU(inplace=True),
    )
    block.to(device).train(training)
    x = torch.randn(shape, device=device, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        out = block(x)
        out += x
