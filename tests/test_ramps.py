"""Clipping limits: set anew, and as ramps over the number of batches."""

from __future__ import annotations

import pytest
import torch
from reference import assert_accurate, batch_renorm_reference, from_case, inputs

from triton_brn import BatchRenorm1d, Ramp


def test_new_limits_take_effect_at_once(backend: str, device) -> None:
    case = inputs((8, 3), first=1, device=device)  # first channel: r above, d below its limit
    layer = from_case(BatchRenorm1d(3), case)
    for limits in (
        {"r_max": 1.0, "d_max": 0.0},
        {"r_max": 2.0, "d_max": 1.0},
        {"r_max": None, "d_max": None},
    ):
        layer.r_max, layer.d_max = limits["r_max"], limits["d_max"]
        assert (layer.r_max, layer.d_max) == (limits["r_max"], limits["d_max"])
        args = (case.x, layer.running_mean, layer.running_var, case.weight, case.bias)
        expected = batch_renorm_reference(*args, **limits)
        assert_accurate(layer(case.x), expected.y)


@pytest.mark.parametrize("step", [0, 10, 11, 15, 19, 20, 21, 10_000_000])
def test_ramps_follow_the_counter(step: int, backend: str, device) -> None:
    limits = {"r_max": Ramp(1.0, 3.0, begin=10, end=20), "d_max": Ramp(4.0, 0.5, begin=15, end=16)}
    case = inputs((8, 3), device=device, first=1)
    layer = from_case(BatchRenorm1d(3, **limits), case)
    layer.num_batches_tracked.fill_(step)
    assert_accurate(layer(case.x), batch_renorm_reference(*case.args, **limits, step=step).y)
    assert layer.num_batches_tracked.item() == step + 1


def test_ramp_at() -> None:
    ramp = Ramp(1.0, 3.0, begin=10, end=20)
    assert [ramp.at(step) for step in (0, 10, 11, 15, 20, 99)] == [1.0, 1.0, 1.2, 2.0, 3.0, 3.0]
    assert Ramp(1.0, 3.0, begin=5, end=5).at(4) == 1.0
    assert Ramp(1.0, 3.0, begin=5, end=5).at(5) == 3.0


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_ramp_of_no_length_is_a_switch(step: int, backend: str, device) -> None:
    ramp = Ramp(1.0, 3.0, begin=5, end=5)
    case = inputs((8, 3), device=device)
    layer = from_case(BatchRenorm1d(3, r_max=ramp, d_max=None), case)
    layer.num_batches_tracked.fill_(step)
    assert_accurate(layer(case.x), batch_renorm_reference(*case.args, r_max=ramp.at(step), d_max=None).y)


def test_ramps_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor has no value to read: as on a GPU, where reading one would stall the stream."""
    from triton_brn import eager as plain

    # The one operator of the plain path that torch has no meta kernel for.
    monkeypatch.setattr(torch, "batch_norm_update_stats", lambda x, *_: (x.new_empty(3), x.new_empty(3)))
    addcmul = torch.addcmul

    def as_on_cuda(first, *args, **options):  # there it takes no scalar of the CPU
        assert first.is_meta
        return addcmul(first, *args, **options)

    monkeypatch.setattr(torch, "addcmul", as_on_cuda)
    x, vector = torch.empty(8, 3, device="meta"), torch.empty(3, device="meta")
    step = torch.zeros((), dtype=torch.int64, device="meta")
    ramp = [1.0, 3.0, 0.0, 9.0]
    for average_std in (True, False):
        y, saved = plain.forward(x, vector, vector, vector, vector, step, -1.0, 1e-5, ramp, ramp, average_std)
        plain.backward(y, x, vector, saved, True, [True, True, True])
