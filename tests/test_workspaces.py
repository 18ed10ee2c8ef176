"""Workspaces of the kernels: nobody else is ever given a word that is kept.

The pools and streams of a GPU have stand-ins here; kernels run on whatever the tests run on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from reference import LAYOUTS, inputs
from test_kernels import EVERYWHERE, assert_nobody_waits, check

from triton_brn import BatchRenorm1d, forced_strategy, workspaces
from triton_brn.views import View

launch = pytest.importorskip("triton_brn.launch", reason="Triton is not installed")

SHAPE = (16, 3, 9, 9)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BRN_BACKEND", "triton")
    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(workspaces, "_buffers", {})


class Pool:
    """A stand-in for the private pool of CUDA graphs: while a thread is redirected, what it allocates is the
    pool's, which gives it to others as soon as the pool says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.redirected = threading.local()
        self.owned: list[torch.Tensor] = []
        for name in ("empty", "zeros", "empty_like"):
            monkeypatch.setattr(torch, name, self.watching(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty", self.watching(torch.Tensor.new_empty))

    def watching(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched(*args, **kwargs) -> torch.Tensor:
            t = allocate(*args, **kwargs)
            if getattr(self.redirected, "on", False) and t.numel():  # Triton's interpreter fills empty ones
                self.owned.append(t)
            return t

        return watched

    def __enter__(self) -> None:
        self.redirected.on = True

    def __exit__(self, *_: object) -> None:
        self.redirected.on = False

    def hand_out(self) -> None:
        """Others write to all that the pool owns."""
        for t in self.owned:
            t.view(torch.uint8).fill_(0x5A) if t.is_contiguous() else t.fill_(float("nan"))

    def has(self, t: torch.Tensor) -> bool:
        address = t.untyped_storage().data_ptr()
        return any(o.untyped_storage().data_ptr() == address for o in self.owned)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    with monkeypatch.context() as patched:
        yield Pool(patched)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_a_warm_up_in_a_private_pool(strategy: str, layout: str, pool: Pool, device) -> None:
    """As torch.compile's mode="reduce-overhead" warms up, and what torch.cuda.use_mem_pool does."""
    with pool:
        check(inputs(SHAPE, layout=layout, device=device), strategy)
    assert pool.owned, "the stand-in sees what is allocated"
    assert workspaces._buffers
    assert not any(map(pool.has, workspaces._buffers.values()))
    for call in launch._calls.values():
        assert not any(pool.has(t) for t in (call.words, call.partials, call.published) if t is not None)
    pool.hand_out()
    check(inputs(SHAPE, layout=layout, device=device), strategy)
    assert_nobody_waits()


@pytest.mark.parametrize("strategy", EVERYWHERE)
def test_what_is_captured_is_the_graphs(strategy: str, pool: Pool, device, monkeypatch) -> None:
    """Its memory comes from the graph's pool, is cleared by the replay, and serves nobody else."""
    check(inputs(SHAPE, device=device), strategy)
    kept = dict(launch._calls)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "capturing", lambda x: True)
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    x = inputs(SHAPE, device=device).x
    with pool, forced_strategy(strategy):
        call = launch.prepared("forward", x, torch.float32)[1]
    assert launch._calls == kept
    assert pool.has(call.words)
    assert not call.words.any()
    assert call.partials is None or pool.has(call.partials)
    for t in workspaces._buffers.values():
        assert t.untyped_storage().data_ptr() != call.words.untyped_storage().data_ptr()


def test_one_handle_that_stands_for_a_stream_of_each_thread(device, monkeypatch) -> None:
    """CUDA's cudaStreamPerThread: nothing of it may be kept."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "current_stream", lambda index: launch.PER_THREAD)
    x = inputs(SHAPE, device=device).x
    calls = [launch.prepared("forward", x, torch.float32)[1] for _ in range(2)]
    assert calls[0].words.data_ptr() != calls[1].words.data_ptr()
    assert not launch._calls
    assert not workspaces._buffers


def test_streams_and_dtypes_share_nothing_and_growth_keeps_what_calls_hold(device) -> None:
    x = torch.empty(1, device=device)
    first = workspaces.buffer(x, 10, torch.int32, 5)
    assert workspaces.buffer(x, workspaces.LEAST, torch.int32, 5) is first
    others = [workspaces.buffer(x, 10, torch.int32, 6), workspaces.buffer(x, 10, torch.float32, 5)]
    grown = workspaces.buffer(x, workspaces.LEAST + 1, torch.int32, 5)
    addresses = {t.untyped_storage().data_ptr() for t in (first, grown, *others)}
    assert len(addresses) == 4
    assert not any(t.any() for t in (first, grown, *others))
    assert workspaces.buffer(x, 10, torch.int32, 5) is grown


def test_the_thread_that_allocates_takes_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is freed there is reused in that stream's order only."""
    mine, set_by = object(), []
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: mine)
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda s: set_by.append((s, threading.get_ident())))
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: set_by.append(size))
    workspaces.made_apart(3, torch.int32, SimpleNamespace(type="cuda"))
    (stream, thread), size = set_by
    assert stream is mine
    assert thread != threading.get_ident()
    assert size == 3


def test_a_failure_to_allocate_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(torch.OutOfMemoryError):
        workspaces.made_apart(3, torch.int32, torch.device("cpu"))


@pytest.mark.skipif(not launch.INTERPRETED, reason="an emulated GPU runs one kernel at a time")
def test_threads_that_share_a_layer() -> None:
    """Training, at the same time as training and evaluation: no count, no update and no output is lost."""
    threads, steps = 4, 5
    layer = BatchRenorm1d(3, momentum=0.5, r_max=1.0, d_max=0.0).to(DEVICE)
    x = torch.randn(16, 3, device=DEVICE)
    alone = layer(x).detach()
    start = threading.Barrier(threads)

    def work(i: int) -> None:
        start.wait()
        for _ in range(steps):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.sum().backward()
            assert torch.equal(y.detach(), alone), "r = 1 and d = 0: the statistics do not matter"
            assert leaf.grad.abs().max() < 1e-5

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, i) for i in range(threads)]:
            done.result()
    assert layer.num_batches_tracked == 1 + threads * steps
    mean = x.mean(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert_nobody_waits()


def test_a_retreat_changes_no_call_that_a_thread_is_using(device) -> None:
    x = inputs(SHAPE, device=device).x
    call = launch.prepared("forward", x, torch.float32)[1]
    plan, held = call.plan, vars(call).copy()
    instead = call.retreated(x, torch.float32)
    assert vars(call) == held
    assert call.plan == plan
    assert instead.plan.strategy == "two_launch"
    assert launch.prepared("forward", x, torch.float32)[1] is instead


def test_threads_that_come_first_compile_once(device) -> None:
    call = launch.Call("inference", View(2, 3, 4), torch.empty(2, 3, 4, device=device), torch.float32)
    compiled: list[tuple] = []

    class Kernel:
        n_spills = 0

        def warmup(self, *arguments: object, **options: object) -> Kernel:
            compiled.append(arguments)
            time.sleep(0.05)
            return self

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return grid

    kernel, start = Kernel(), threading.Barrier(4)

    def first(_: int) -> object:
        start.wait()
        return call.compiled(kernel, (), (True,), "key")

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(first, range(4)))
    assert len(compiled) == 1
    assert runs == [(call.plan.slots, call.plan.splits, 1)] * 4
