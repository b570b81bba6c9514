"""Clocks. On a GPU: events around replays of a CUDA graph whose calls rotate over more memory than its cache. On a CPU: the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Four sets of this many bytes together defeat a 60 MB L2 cache
COLD_BYTES = 240 * 2**20
# Smaller tensors than COLD_BYTES / MOST_SETS stay in the cache: what is seen of them is latency
MOST_SETS = 256
SMALL_BYTES = 2**20


def rotation(bytes_of_one: int, device: str) -> int:
    """How many sets of tensors a case rotates over."""
    return 1 if device == "cpu" else min(MOST_SETS, max(4, -(-COLD_BYTES // max(bytes_of_one, 1))))


_origin: list[torch.cuda.Event] = []
_on_device = False


def time_on_device(device: str) -> None:
    """What `clock` reads from now on."""
    global _on_device
    _on_device = device == "cuda"


def clock() -> float:
    """Seconds, for ``@pytest.mark.benchmark(timer=clock)``: on a GPU of an event behind all work queued so far, else the wall clock's."""
    if not _on_device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    if not _origin:
        _origin.append(event)
    return _origin[0].elapsed_time(event) / 1e3


def graphed(call: Callable[[], object], times: int) -> tuple[Callable[[], object], str | None]:
    """(a CUDA graph's replay of ``times`` calls, None), or (the calls one by one, why they cannot be captured)."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks: lazy initialisation is not captured
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return (lambda: [call() for _ in range(times)]), str(error).splitlines()[0]
    return graph.replay, None


def host_seconds(call: Callable[[], object], times: int = 50) -> float:
    """Median wall clock of a call without waiting for the device: what the host spends to issue it."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(found)


@contextmanager
def threads_for(bytes_of_x: int, most: int | None = None) -> Iterator[int]:
    """One thread for small tensors, whose time is the host's; waking a second thread costs up to ten times as much and hides it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if bytes_of_x < SMALL_BYTES else most or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def copy_rate(device: str, size: int = 256 * 2**20) -> float:
    """Bytes read plus bytes written a second by a copy in this process: the ceiling that figures are quoted against."""
    if device == "cpu":
        size //= 4
    source, target = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    times = []
    for _ in range(8):
        start = clock()
        target.copy_(source)
        times.append(clock() - start)
    return 2 * size / statistics.median(times[2:])


def interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Wall-clock seconds of two callables that take turns, so that the machine's noise hits both."""
    for _ in range(3):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[k]()
            times[k].append(time.perf_counter() - start)
    return times
