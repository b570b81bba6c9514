"""Clocks. On a GPU: CUDA events around calls that rotate over buffers larger than the L2 cache. On a CPU: the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Four sets of this many bytes together defeat a 60 MB L2 cache
COLD_BYTES = 240 * 2**20


def rotation(bytes_of_one: int, device: str) -> int:
    """How many sets of tensors a case rotates over."""
    return 1 if device == "cpu" else max(4, -(-COLD_BYTES // max(bytes_of_one, 1)))


def cuda_event_timer(device: str) -> Callable[[], float]:
    """A monotonic clock of device time for pytest-benchmark: seconds at which the work queued so far is done."""
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return origin.elapsed_time(event) / 1e3

    return now


def copy_rate(device: str, size: int = 256 * 2**20) -> float:
    """Bytes read plus bytes written a second by a copy in this process: the ceiling that figures are quoted against."""
    if device == "cpu":
        size //= 4
    source, target = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    clock = time.perf_counter if device == "cpu" else cuda_event_timer(device)
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
