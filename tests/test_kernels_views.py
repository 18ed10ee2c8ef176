"""Tensors whose memory does not hold their values: views of negatives, zero tensors, expanded ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import inputs
from torch import Tensor

from triton_brn import Ramp, batch_renorm, ops

pytest.importorskip("triton", reason="Triton is not installed")

NAMES = ("x", "weight", "bias", "running_mean", "running_var", "step", "dy")
OPTIONS = {"momentum": 0.25, "r_max": Ramp(1.0, 3.0, begin=4, end=11), "d_max": 0.5}


def negative_view(t: Tensor) -> Tensor:
    """t's values, in memory that holds their negatives."""
    return torch._neg_view((-t).contiguous())


def imaginary(t: Tensor) -> Tensor:
    """The same, as users come by it: dense where t has one element."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def case(device: torch.device) -> dict[str, Tensor]:
    given = vars(inputs((6, 5, 3, 4), device=device))
    tensors = {name: given[name] for name in NAMES if name in given}
    return {**tensors, "step": torch.tensor(7, device=device)}


def results(t: dict[str, Tensor], training: bool, call: Callable[..., Tensor] = batch_renorm) -> list[Tensor]:
    """All that a step leaves."""
    leaves = [t[name].requires_grad_() for name in ("x", "weight", "bias")]
    running = (t["running_mean"], t["running_var"])
    counter = {"num_batches_tracked": t["step"]}
    y = call(t["x"], *running, t["weight"], t["bias"], training=training, **counter, **OPTIONS)
    grads = torch.autograd.grad(y, leaves, t["dy"])
    return [v.detach().resolve_neg().clone() for v in (y, *grads, *running, t["step"])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [*NAMES, "all"])
def test_views_of_negatives(names: str, training: bool, backend: str, device) -> None:
    expected = results(case(device), training)
    for _ in range(2):  # the second finds what was prepared for the first
        given = case(device)
        viewed = {name: negative_view(t) for name, t in given.items() if names in (name, "all")}
        assert all(t.is_neg() for t in viewed.values())
        actual = results({**given, **viewed}, training)
        assert all(map(torch.equal, actual, expected)), names
    assert all(map(torch.equal, results(case(device), training), expected)), "nor were others for it"


@pytest.mark.parametrize("names", ["weight", "bias", "running_mean", "running_var"])
def test_the_imaginary_part_of_a_conjugate(names: str, backend: str, device) -> None:
    """Of statistics, whose memory must be dense, only a lone one can be."""
    given = case(device)
    for name in ("x", "dy"):
        given[name] = given[name][:, :1].contiguous()
    for name in NAMES[1:5]:
        given[name] = given[name][:1].clone()
    expected = results({name: t.clone() for name, t in given.items()}, True)
    given[names] = imaginary(given[names])
    assert given[names].is_neg()
    assert all(map(torch.equal, results(given, True), expected))


def test_the_operator_takes_them_too(backend: str, device) -> None:
    """Torch's fallback for negative views takes one argument that is updated, not three."""
    settings = (0.25, 1e-5, [3.0, 3.0, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0], True)
    left = []
    for made in (torch.clone, negative_view):
        t = {name: made(v) for name, v in case(device).items()}
        y, saved = ops.OPS.forward(*(t[name] for name in NAMES[:6]), *settings)
        left.append([v.resolve_neg() for v in (y, saved, *(t[name] for name in NAMES[3:6]))])
    assert all(map(torch.equal, *left))


def zero(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "dy"])
def test_zero_tensors(name: str, training: bool, backend: str, device) -> None:
    """They have no memory: a kernel would read at address 0."""
    given = case(device)
    expected = results({**given, name: torch.zeros_like(given[name])}, training)
    given = case(device)
    actual = results({**given, name: zero(given[name])}, training)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)  # without beta torch adds in another order


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_that_are_zero_tensors_are_refused(name: str, device, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    t = case(device)
    counter = t.pop("step")
    given = {
        "running_mean": t["running_mean"],
        "running_var": t["running_var"],
        "num_batches_tracked": counter,
    }
    given[name] = zero(given[name])
    before = {key: v.clone() for key, v in given.items()}
    with pytest.raises(ValueError, match=f"^{name}: "):
        batch_renorm(t["x"], **given, training=True)
    assert all(torch.equal(v, before[key]) for key, v in given.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "dy"])
def test_expanded_tensors(name: str, training: bool, backend: str, device) -> None:
    given = case(device)
    one = given[name].detach().flatten()[0]
    expected = results({**given, name: one.expand(given[name].shape).clone()}, training)
    actual = results({**case(device), name: one.expand(given[name].shape)}, training)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-5)  # plain PyTorch sums dy in another order


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_overlap_are_refused(name: str, backend: str, device) -> None:
    t = case(device)
    running = {key: t[key].clone() for key in ("running_mean", "running_var")}
    running[name] = running[name][:1].expand(5)
    before = {key: v.clone() for key, v in running.items()}
    with pytest.raises(ValueError, match=f"^{name}: expected a contiguous tensor"):
        batch_renorm(t["x"], **running, training=True)
    assert all(torch.equal(v, before[key]) for key, v in running.items())
