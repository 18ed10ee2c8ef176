"""The kernels against Algorithm 1 in float64: every strategy, layout and dtype, ragged sizes.

They run on the GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from conftest import DEVICE
from reference import (
    LAYOUTS,
    ODD_LAYOUTS,
    Inputs,
    assert_accurate,
    batch_renorm_reference,
    inference_reference,
    inputs,
    lay_out,
    reference_gradients,
    sum_scales,
)
from torch import Tensor

from triton_brn import Ramp, batch_renorm, forced_strategy, planner, plans, views, workspaces

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

GPU = launch.device_of(torch.empty(1, device=DEVICE))
NOT_HERE = {  # strategies, and why this device has none of them
    **({} if GPU.clusters else {"cluster": "no clusters on this device, or with this Triton"}),
    **({} if GPU.waits else dict.fromkeys(("cooperative", "blocked"), "programs run one after another")),
}
STRATEGIES = [strategy for strategy in plans.STRATEGIES if strategy not in NOT_HERE]
EVERYWHERE = [strategy for strategy in STRATEGIES if strategy != "cluster"]  # for channels of any size
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (6, 17),
    (40, 64),
    (3, 1, 33),
    (4, 3, 7, 7),
    (2, 17, 35, 35),
    (1, 3, 149, 149),
    (3, 64, 4, 4),
    (2, 3, 4, 5, 6),
)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")


def run(case: Inputs, strategy: str | None = None, **options) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """y, the gradients of x, weight and bias, and the step counter; the case's statistics change."""
    leaves = [None if t is None else t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    step = options.pop("step", torch.tensor(7, device=case.x.device))
    with forced_strategy(strategy) if strategy else nullcontext():
        y = batch_renorm(*case.args, num_batches_tracked=step, **options)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.dy))
    return y.detach(), [None if t is None else next(grads) for t in leaves], step


def check(case: Inputs, strategy: str | None = None, **options) -> tuple[Tensor, list[Tensor | None]]:
    """Train on one batch and compare all that comes out with the reference."""
    before = dataclasses.replace(
        case, running_mean=case.running_mean.clone(), running_var=case.running_var.clone()
    )
    y, grads, step = run(case, strategy, training=True, **options)
    if "running_average" in options:
        options["average"] = options.pop("running_average")
    options.setdefault("step", 7)
    expected = batch_renorm_reference(*before.args, **options)
    assert_accurate(y, expected.y)
    assert_accurate(
        case.running_mean, expected.running_mean, scale=sigma(before).abs() + expected.running_mean.abs()
    )
    assert_accurate(case.running_var, expected.running_var, scale=expected.running_var + 1e-5)
    assert step == options["step"] + 1
    check_gradients(grads, before, **options)
    for t in (y, grads[0]):
        assert t.stride() == torch.empty_like(case.x).stride()
        assert t.dtype == case.x.dtype
    return y, grads


def check_gradients(grads: list[Tensor | None], case: Inputs, **options) -> None:
    expected = reference_gradients(case.dy, *case.args, **options)
    scales = sum_scales(case.dy, *case.args[:3], **options)
    for actual, e, scale in zip(grads, expected, (None, *scales), strict=True):
        assert (actual is None) == (e is None)
        if actual is not None:
            assert_accurate(actual, e, scale=scale)


def sigma(case: Inputs) -> Tensor:
    return (case.running_var.double() + 1e-5).sqrt()


@functools.cache
def serves(strategy: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> bool:
    """Whether a strategy can hold the channels of such a tensor, forward and backward."""
    if shape[1] == 64 and layout == "contiguous" and len(shape) > 2 and dtype != torch.bfloat16:
        return False  # 64 programs are slow in the interpreter: once is enough
    x = inputs(shape, dtype, layout, device="cpu").x
    view = views.view_of(x.shape, x.stride())
    with forced_strategy(strategy):
        try:
            for direction in ("forward", "backward"):
                planner.plan(direction, view, x.element_size(), GPU)
        except ValueError:
            return False
    return True


CASES = [
    (strategy, shape, layout, dtype)
    for strategy in STRATEGIES
    for shape in SHAPES
    for layout in LAYOUTS[: len(shape) - 1]
    for dtype in DTYPES
    if serves(strategy, shape, layout, dtype)
]


@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_strategies_are_tested(strategy: str) -> None:
    if strategy in NOT_HERE:
        pytest.skip(f"{strategy}: {NOT_HERE[strategy]}")
    tested = {(layout, dtype) for name, _, layout, dtype in CASES if name == strategy}
    layouts = LAYOUTS[:1] if strategy == "cluster" else LAYOUTS  # no clusters for rows
    assert tested == {(layout, dtype) for layout in layouts for dtype in DTYPES}


@pytest.mark.parametrize(
    ("strategy", "shape", "layout", "dtype"),
    [pytest.param(*case, id="-".join(map(str, case)).replace("torch.", "")) for case in CASES],
)
def test_training(strategy: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, device) -> None:
    # Of C = 1 only one kind of r and d can be had: one that is clipped on both sides of the run.
    case = inputs(shape, dtype, layout, device=device, r_max=1.5, d_max=0.5, first=1)
    check(case, strategy, momentum=0.1, r_max=1.5, d_max=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training_sums", [True, False])
def test_inference(layout: str, dtype: torch.dtype, training_sums: bool, device) -> None:
    case = inputs((3, 17, 7, 7), dtype, layout, device=device)
    if not training_sums:  # nobody asks for the parameters' gradients: dx alone
        case.weight, case.bias = None, None
    mean, var = case.running_mean.clone(), case.running_var.clone()
    y, grads, step = run(case, training=False)
    assert_accurate(y, inference_reference(*case.args))
    check_gradients(grads, case, training=False)
    assert step == 7
    assert torch.equal(case.running_mean, mean)
    assert torch.equal(case.running_var, var)
    with torch.no_grad():
        assert torch.equal(batch_renorm(*case.args), y)


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 9), (2, 9, 5, 6)])
def test_odd_strides(strategy: str, layout: str, shape: tuple[int, ...], device) -> None:
    check(inputs(shape, torch.float16, layout, device=device), strategy)


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_gradient_of_other_strides(strategy: str, device) -> None:
    case = inputs((2, 9, 5, 6), layout="channels_last", device=device)
    case.dy = case.dy.contiguous()
    check(case, strategy)
    case = inputs((2, 9, 5, 6), device=device)
    case.dy = case.dy[..., :1].expand(2, 9, 5, 6)
    check(case, strategy)


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_far_from_zero(strategy: str, layout: str, device) -> None:
    """Mean 1e4, standard deviation 1e-2: a mean of one float32 would be off by 5 % of that."""
    case = inputs((16, 9, 7, 9), layout=layout, device=device)
    case.x = lay_out((torch.randn(case.x.shape) * 1e-2 + 1e4).to(device), layout)
    check(case, strategy, r_max=1.0, d_max=0.0)


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_affine_and_in_half(strategy: str, layout: str, device) -> None:
    check(inputs((2, 9, 5, 6), layout=layout, device=device, affine=False), strategy)
    for keep in ("weight", "bias"):
        case = inputs((2, 9, 5, 6), layout=layout, device=device)
        case = dataclasses.replace(case, **{"bias" if keep == "weight" else "weight": None})
        check(case, strategy)
    half = inputs((2, 9, 5, 6), torch.bfloat16, layout, device=device, weight_dtype=torch.bfloat16)
    grads = check(half, strategy)[1]
    assert grads[1].dtype == grads[2].dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_settings(strategy: str, device) -> None:
    ramps = {"r_max": Ramp(1.0, 3.0, begin=4, end=11), "d_max": Ramp(0.0, 5.0, begin=6, end=9)}
    for dtype in (torch.float32, torch.float64):
        for step in (0, 4, 7, 9, 30):
            case = inputs((7, 9), dtype, device=device)
            check_step(case, strategy, step, **ramps)
        check(inputs((7, 9), dtype, device=device), strategy, r_max=None, d_max=None)
        check(inputs((7, 9), dtype, device=device), strategy, momentum=None)
        check(inputs((7, 9), dtype, device=device), strategy, running_average="var", momentum=0.3)
        check(inputs((7, 9), dtype, device=device, eps=1e-3), strategy, eps=1e-3, momentum=1.0)


def check_step(case: Inputs, strategy: str, step: int, **options) -> None:
    before = [t.clone() for t in (case.running_mean, case.running_var)]
    y, _, counter = run(
        case, strategy, training=True, step=torch.tensor(step, device=case.x.device), **options
    )
    assert counter == step + 1
    assert_accurate(
        y, batch_renorm_reference(case.x, *before, case.weight, case.bias, step=step, **options).y
    )


@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_some_gradients(strategy: str, wanted: tuple[bool, bool], device) -> None:
    case = inputs((2, 9, 5, 6), device=device)
    expected = reference_gradients(case.dy, *case.args)
    leaves = [case.x.requires_grad_(wanted[0]), case.weight.requires_grad_(wanted[1])]
    with forced_strategy(strategy):
        y = batch_renorm(*case.args, training=True)
        actual = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], case.dy)
    assert_accurate(actual[0], expected[0 if wanted[0] else 1], scale=None if wanted[0] else 200.0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    names: list[str] = []
    original = launch.Call.launch

    def counting(self, kernel, arguments, phases, key):
        names.extend([kernel.__name__] * len(phases))
        return original(self, kernel, arguments, phases, key)

    monkeypatch.setattr(launch.Call, "launch", counting)
    return names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(layout: str, device, launched: list[str]) -> None:
    for strategy in EVERYWHERE:
        each = 2 if strategy == "two_launch" else 1
        run(inputs((2, 9, 5, 6), layout=layout, device=device), strategy, training=True)
        assert launched == ["batch_renorm_forward_kernel"] * each + ["batch_renorm_backward_kernel"] * each
        launched.clear()
    run(inputs((2, 9, 5, 6), layout=layout, device=device), training=False)
    assert launched == ["batch_renorm_inference_kernel", "batch_renorm_backward_kernel"]


@pytest.fixture
def replanned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., plans.Plan]], None]:
    """Has every plan changed by a function of it and the view."""

    def use(change: Callable[..., plans.Plan]) -> None:
        original = planner.plan
        monkeypatch.setattr(planner, "plan", lambda *args: change(original(*args), args[1]))
        monkeypatch.setattr(launch, "_calls", {})

    return use


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_int64_offsets(strategy: str, layout: str, device, replanned) -> None:
    replanned(lambda how, view: dataclasses.replace(how, tile=how.tile._replace(wide=True)))
    check(inputs((2, 9, 5, 5), torch.bfloat16, layout, device=device), strategy)
    run(inputs((2, 9, 5, 5), torch.bfloat16, layout, device=device), training=False)


@pytest.mark.parametrize("shape", [(700, 9), (1500, 8), (9, 3, 31, 32), (9, 3, 31, 31), (100, 17, 7, 7)])
@pytest.mark.parametrize("stages", [2, 4] if GPU.capability else [2])
@pytest.mark.parametrize("strategy", [s for s in ("blocked", "two_launch") if s in STRATEGIES])
def test_tiles_that_are_on_their_way(strategy: str, stages: int, shape, device, replanned) -> None:
    """Loops that load tiles ahead, as tuning tries them; the interpreter has no notion of it."""

    def ahead(how: plans.Plan, view: views.View) -> plans.Plan:
        total = views.length(view, how.tile)
        splits = views.whole_splits(total, 2, how.tile.grain)
        assert total > 2 * splits * how.tile.block, "loops of two tiles at least"
        return dataclasses.replace(how, splits=splits, tile=how.tile._replace(stages=stages))

    replanned(ahead)
    check(inputs(shape, torch.bfloat16, device=device), strategy)
    run(inputs(shape, torch.bfloat16, device=device), training=False)


def test_past_2_31_elements(device) -> None:
    """Channel 0 of a (9, 2**17, 2**11) tensor, in place; all but 18,432 elements stay untouched."""
    from triton_brn.kernels.inference import batch_renorm_inference_kernel

    view = views.View(9, 2**17, 2**11)
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 5 * 2**30:
        pytest.skip("needs 5 GiB of device memory")
    x = torch.empty(view, dtype=torch.float16, device=device)
    x[:, 0] = torch.randn(view.outer, view.inner, device=device)
    expected = (x[:, 0].double() - 0.5) / (4.0 + 1e-5) ** 0.5
    mean, var = torch.full((1,), 0.5, device=device), torch.full((1,), 4.0, device=device)
    how = planner.plan("inference", view, 2, GPU)
    assert how.tile.wide
    arguments = (x, x, (None, None), (mean, var), mean, *view, launch.numbers(1e-5))
    batch_renorm_inference_kernel[(1, 1)](*arguments, SAVE=False, T=how.tile, num_warps=how.num_warps)
    assert_accurate(x[:, 0], expected)


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_repeatable(strategy: str, device) -> None:
    results = []
    for _ in range(2):
        case = inputs((64, 3, 9, 9), device=device)
        y, grads, _ = run(case, strategy, training=True)
        results.append([y, *grads, case.running_mean, case.running_var])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert_nobody_waits()


def assert_nobody_waits() -> None:
    """No arrival is left in any word of the barriers, see kernels/barrier.py."""
    for (*_, dtype), words in workspaces._buffers.items():
        if dtype == torch.int32:
            assert not (words & 0xFFFF).any()


def test_barrier_words_wrap_around(device) -> None:
    """A word's openings overflow after 2**16 launches; the 2**15th makes it negative."""
    case = inputs((64, 3, 9, 9), device=device)
    strategy = "cooperative" if GPU.waits else "two_launch"
    expected = run(inputs((64, 3, 9, 9), device=device), strategy, training=True)[0]
    words = [t for (*_, dtype), t in workspaces._buffers.items() if dtype == torch.int32]
    for opened in (2**15 - 2, 2**16 - 2):
        for t in words:
            t[1:] = (opened << 16) - (2**32 if opened >= 2**15 else 0)  # the first counts the batches' groups
        for _ in range(2):
            case = inputs((64, 3, 9, 9), device=device)
            assert torch.equal(run(case, strategy, training=True)[0], expected)
    for t in words:
        t.zero_()


def test_forced_strategy_that_cannot_serve(device) -> None:
    case = inputs((1, 3, 256, 256), device=device)
    before = case.running_mean.clone()
    with pytest.raises(ValueError, match=r"strategy: 'resident' cannot run forward on .*registers hold"):
        run(case, "resident", training=True)
    with pytest.raises(ValueError, match=r"strategy: 'cluster' cannot run forward on .*cluster"):
        run(inputs((40, 64), device=device), "cluster", training=True)
    assert torch.equal(case.running_mean, before)
    with (
        pytest.raises(ValueError, match="strategy: expected one of resident, cluster, cooperative"),
        forced_strategy("fast"),
    ):
        pass
