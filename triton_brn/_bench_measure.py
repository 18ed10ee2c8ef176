"""How times are taken: contestants in turns, on the wall clock or by device events."""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from .version import __version__

Call = Callable[[], object]
Clock = Callable[[Call], float]  # runs a call and says how many seconds it took
Times = dict[str, list[float]]  # seconds per call, one of each round, by contestant

COPY_BYTES = 256 << 20  # of each buffer: more than any cache holds
#: A block of calls on the wall clock, at least. A busy machine interrupts blocks of a few ms, and those of
#: slow contestants more often than those of quick ones.
BLOCK_SECONDS = 3e-4
MOST_CALLS = 50


@dataclass(frozen=True)
class Effort:
    """How long to measure one direction of one input."""

    seconds: float = 2.0  # after which no further round begins
    least: int = 8  # rounds
    most: int = 100


QUICK = Effort(seconds=0.4, least=3, most=20)


def order(names: list[str], number: int) -> list[str]:
    """The contestants as they run in this round: a Williams design, in which each follows each equally often.

    A contestant finds the caches and the allocator as the one before it left them: rotated, it
    would always be the same one.
    """
    n = len(names)
    turns = [names[(number + (-1) ** (place + 1) * ((place + 1) // 2)) % n] for place in range(n)]
    return turns[::-1] if n % 2 and number // n % 2 else turns


def one_round(calls: Mapping[str, Call], times: Times, clock: Clock) -> None:
    """Time every contestant once. Whatever else the machine does meets all of them alike."""
    names = list(calls)
    for name in order(names, len(times[names[0]])):
        times[name].append(clock(calls[name]))


def rounds(calls: Mapping[str, Call], clock: Clock, effort: Effort) -> Times:
    """Rounds until the effort is spent."""
    times: Times = {name: [] for name in calls}
    if not calls:
        return times
    start = perf_counter()
    with no_garbage_collection():
        for done in range(effort.most):
            if done >= effort.least and perf_counter() - start > effort.seconds:
                break
            one_round(calls, times, clock)
    return times


def ratio(times: Times, over: str, under: str) -> float:
    """How many times the time of ``under`` the contestant ``over`` takes: median over rounds."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def quantile(values: list[float], q: float) -> float:
    """By linear interpolation, as numpy's."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in a measured block would be blamed on whoever runs then."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 32 MiB a piece, until the process ends.

    Otherwise the end of the heap goes back to the system, and the next call pays a page fault for every
    4 KiB: 64 us for each MiB, for whichever contestant's tensors happen to lie there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 << 20)


def wall_clock(calls: int = 1, wait: Call = lambda: None) -> Clock:
    """Seconds per call of a block of calls, one after another, until ``wait`` returns."""

    def clock(call: Call) -> float:
        start = perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (perf_counter() - start) / calls

    return clock


def block_of(calls: Mapping[str, Call], wait: Call = lambda: None) -> int:
    """Calls in a block, so that the quickest contestant's is long enough for the clock."""
    clock = wall_clock(1, wait)
    quickest = min((clock(call) for call in calls.values()), default=BLOCK_SECONDS)
    return max(1, min(MOST_CALLS, int(BLOCK_SECONDS / max(quickest, 1e-9))))


class ColdEvents:
    """The time that one call takes on a CUDA device whose L2 holds none of its inputs.

    The buffer that is cleared before keeps the device busy while the host prepares the call: what
    the host needs beyond that shows as well. Start and end cost about 2 us themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(COPY_BYTES, dtype=torch.int8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Call) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


def captured(make: Callable[[], Call]) -> Call:
    """The replay of a CUDA graph of one call: no host between its kernels.

    Args:
        make: makes the call on the current stream, which is the one that captures. A backward must
            have had its forward there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay(keep: Call = call) -> None:  # the graph reads tensors that the call owns
        graph.replay()

    return replay


def peak_memory(call: Call) -> float:
    """MiB that a call holds at most, beyond what was there."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(call: Call) -> int:
    """Kernels, fills and copies that the device runs for a call; 0 where the profiler may not look."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return on_the_device(profiler.events() or ())


def on_the_device(events: Iterable[object]) -> int:
    """Events of a profile that are the device's own work, without the spans that annotate it."""
    return sum(
        str(getattr(event, "device_type", "")) == "DeviceType.CUDA"
        and not getattr(event, "is_user_annotation", False)
        for event in events
    )


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large tensor's copy, read and write counted: what streaming kernels can reach here."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    clock: Clock = ColdEvents(device) if device.type == "cuda" else wall_clock()
    times = rounds({"copy": lambda: target.copy_(source)}, clock, Effort(seconds=1, least=7, most=30))
    return 2 * COPY_BYTES / statistics.median(times["copy"][2:]) / 1e9


def stamp(device: torch.device) -> dict[str, str]:
    """What the numbers belong to: device and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{cpu_model()}, {threads} thread{'s' * (threads > 1)}"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "triton_brn": __version__,
    }


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
