"""How a call is timed. All providers of a case take turns, in an order that rotates, so that the machine's noise hits all of them.

On a GPU: device time by events around replays of a CUDA graph, cold (the calls rotate over more memory than the L2 cache holds) and
warm (the same tensors again and again); beside it the host's time to issue a call. On a CPU: the wall clock of a call.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .providers import tensors

# Four times the L2 cache of an H200 (60 MB)
COLD_BYTES = 240 * 2**20
# Smaller tensors than COLD_BYTES / MOST_SETS stay in the cache: what is seen of them is latency, and the figure's note says so
MOST_SETS = 256
SMALL_BYTES = 2**20
ROUNDS = 7
# Calls in a graph, or in a burst of the host's: enough to make the clock's own cost small
CALLS = 20
# A sample on a CPU lasts at least this long
SAMPLE_SECONDS = 4e-3
# Some 0.1 ms: the device waits while the host queues what is timed, so that launching it is not in its time
_HEAD_START_CYCLES = 200_000

Call = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """One set of tensors: the leaves of a call (x and perhaps a residual) and the gradients of its one or two outputs."""

    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass
class Figures:
    """What was measured of a call; names and units as in `results.OperatorRow`."""

    device_us: float | None = None
    device_warm_us: float | None = None
    host_us: float | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    spread: float | None = None
    note: str | None = None


# ------------------------------------------------------------------------------------------------------------ what is called
def rotation(bytes_of_one: int, device: str) -> int:
    """How many sets of tensors a case rotates over."""
    return 1 if device == "cpu" else min(MOST_SETS, max(2, -(-COLD_BYTES // max(bytes_of_one, 1))))


def inputs(case: Case, device: str, training: bool = True, sets: int | None = None) -> list[Inputs]:
    """Random sets of tensors: as many (or ``sets``) as together exceed the L2 cache; one on a CPU."""
    found = []
    for seed in range(sets or rotation(case.tensor_bytes * (2 if case.residual else 1), device)):
        x, residual, dy = tensors(case, device, seed)
        leaves = tuple(t.requires_grad_(training) for t in (x, residual) if t is not None)
        # with a residual there may be two outputs, and the second one's gradient must be other memory
        found.append(Inputs(leaves, (dy, *(t.detach() for t in leaves[1:]))))
    return found


def call_of(module: nn.Module, data: Sequence[Inputs], direction: str) -> Call:
    """One pass of ``module``, which takes the sets of ``data`` in turn; modules in eval mode run without grad.

    A backward alone is that of forwards run here, before it is called; what they saved is kept for the next time.
    """
    turns = itertools.cycle(data)

    def outputs(given: Inputs) -> tuple[Tensor, ...]:
        out = module(*given.leaves)
        return out if isinstance(out, tuple) else (out,)

    def wanted(given: Inputs) -> list[Tensor]:
        return [*given.leaves, *module.parameters()]

    def forward() -> object:
        with torch.set_grad_enabled(module.training):
            return module(*next(turns).leaves)

    def forward_backward() -> object:
        given = next(turns)
        heads = outputs(given)
        return heads, torch.autograd.grad(heads, wanted(given), given.gradients[: len(heads)])

    if direction == "forward":
        return forward
    if direction == "forward_backward":
        return forward_backward
    kept = itertools.cycle([(heads, wanted(d), d.gradients[: len(heads)]) for d in data for heads in (outputs(d),)])
    return lambda: torch.autograd.grad(*next(kept), retain_graph=True)


# ---------------------------------------------------------------------------------------------------------------- statistics
def take_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each timer returned in ``rounds`` rounds; the order moves on by one in each. A round before them warms up and is not kept."""
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1 if names else 0):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = timers[name]()
            if turn:
                samples[name].append(taken)
    return samples


def spread(values: Sequence[float]) -> float | None:
    """Interquartile range over the median; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


# ------------------------------------------------------------------------------------------------------------------- clocks
def wall_us(run: Call, calls: int) -> float:
    """Microseconds of one of ``calls`` calls of ``run``, by the wall clock, the device not waited for."""
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start) / calls


def device_us(run: Call, calls: int) -> float:
    """The same between two events on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1e3 * milliseconds / calls


def host_us(run: Call, calls: int) -> float:
    """What the host spends to issue a call: `wall_us` from an idle device on."""
    torch.cuda.synchronize()
    return wall_us(run, calls)


def repeated(call: Call, times: int, kept: int = 1) -> Call:
    """``times`` calls. The last ``kept`` results live on, so that the next do not take their place, which is still in the cache."""

    def run() -> None:
        results: deque[object] = deque(maxlen=kept)
        for _ in range(times):
            results.append(call())

    return run


@dataclass(frozen=True)
class Captured:
    """``times`` calls as one CUDA graph, or one by one where ``why_not`` says why they cannot be captured."""

    run: Call
    times: int
    launches: int | None = None  # of one call, where the graph's nodes can be counted
    why_not: str | None = None

    def us(self) -> float:
        return device_us(self.run, self.times)


def captured(call: Call, times: int = CALLS, kept: int = 1, pool: Any = None) -> Captured:
    """Captures ``times`` calls on the current stream, which must not be the default one.

    Not through ``torch.cuda.graph``: it empties the allocator's cache at every capture, and a case has dozens. Graphs that are never
    replayed at the same time may share a ``pool`` of memory.
    """
    for _ in range(3):  # compilation, autotuning and lazy initialisation cannot be captured
        call()
    run = repeated(call, times, kept)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    collected = gc.isenabled()
    gc.disable()  # what is freed in the middle of a capture may wait for the device, which would end the capture
    try:
        graph.capture_begin(pool)
        try:
            run()
        finally:
            graph.capture_end()
        graph.instantiate()
    except Exception as error:  # libraries have classes of their own for what CUDA refuses
        torch.cuda.synchronize()
        # the first of the chain is the cause; capture_end only says that there was one
        cause = error.__context__ or error
        return Captured(run, times, why_not=(str(cause).splitlines() or [type(cause).__name__])[0])
    finally:
        if collected:
            gc.enable()
    nodes = launches_in(graph)
    return Captured(graph.replay, times, None if nodes is None else round(nodes / times))


def launches_in(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and memsets of a graph that was kept; None without NVIDIA's cuda-bindings, which come with torch."""
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found,import-untyped]
    except ImportError:
        return None
    kinds = runtime.cudaGraphNodeType
    counted = (kinds.cudaGraphNodeTypeKernel, kinds.cudaGraphNodeTypeMemcpy, kinds.cudaGraphNodeTypeMemset)
    raw = graph.raw_cuda_graph()
    _, _, number = runtime.cudaGraphGetNodes(raw)
    _, nodes, _ = runtime.cudaGraphGetNodes(raw, number)
    return sum(runtime.cudaGraphNodeGetType(node)[1] in counted for node in nodes[:number])


def launches_seen(call: Call) -> int | None:
    """The same of one call by torch's profiler; None where the profiler sees nothing of the device, as in some sandboxes."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in found.events() or ()) or None


def peak_bytes(call: Call) -> int:
    """Most bytes that torch's allocator had handed out during a call, over those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


# ---------------------------------------------------------------------------------------------------------------- measuring
def measure(
    modules: Mapping[str, nn.Module], data: Sequence[Inputs], direction: str, device: str, rounds: int = ROUNDS
) -> dict[str, Figures | Exception]:
    """One pass of all modules, which take turns; of one that raises, what it raised. On a GPU: call it within `side_stream`."""
    return (_on_gpu if device == "cuda" else _on_cpu)(modules, data, direction, rounds)


def _on_cpu(modules: Mapping[str, nn.Module], data: Sequence[Inputs], direction: str, rounds: int) -> dict[str, Figures | Exception]:
    found: dict[str, Figures | Exception] = {}
    timers: dict[str, Callable[[], float]] = {}
    with threads_for(data[0].leaves[0].nbytes) as threads:
        for name, module in modules.items():
            try:
                call = call_of(module, data, direction)
                timers[name] = _burst(call)
            except Exception as error:
                found[name] = error
        for name, values in take_turns(timers, rounds).items():
            found[name] = Figures(host_us=statistics.median(values), spread=spread(values), note=_threads(threads))
    return found


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _burst(call: Call) -> Callable[[], float]:
    """A timer of as many calls as fill a sample."""
    for _ in range(3):
        call()
    times = max(1, min(1000, round(SAMPLE_SECONDS * 1e6 / wall_us(call, 1))))
    run = repeated(call, times)
    return lambda: wall_us(run, times)


def _on_gpu(modules: Mapping[str, nn.Module], data: Sequence[Inputs], direction: str, rounds: int) -> dict[str, Figures | Exception]:
    figures: dict[str, Figures] = {}
    failed: dict[str, Exception] = {}
    timers: dict[str, dict[str, Callable[[], float]]] = {"device_us": {}, "device_warm_us": {}, "host_us": {}}
    free()
    pool = torch.cuda.graph_pool_handle()
    for name, module in modules.items():
        try:
            same = call_of(module, data[:1], direction)
            cold = captured(call_of(module, data, direction), max(len(data), CALLS // 2), len(data), pool)
            warm = captured(same, pool=pool)
            launches = launches_seen(same) if cold.launches is None else cold.launches
            figures[name] = Figures(launches=launches, peak_bytes=peak_bytes(same), note="; ".join(_notes(cold, data)) or None)
        except Exception as error:  # the others are still worth their figures; a device that is lost shows in what follows
            failed[name] = error
            continue
        timers["device_us"][name], timers["device_warm_us"][name] = cold.us, warm.us
        timers["host_us"][name] = partial(host_us, repeated(same, CALLS), CALLS)
    for kind, clocks in timers.items():
        for name, values in take_turns(clocks, rounds).items():
            setattr(figures[name], kind, statistics.median(values))
            if kind == "device_us":
                figures[name].spread = spread(values)
    return {**figures, **failed}


def _notes(cold: Captured, data: Sequence[Inputs]) -> Iterator[str]:
    if cold.why_not is not None:
        yield f"no CUDA graph, so the host's time may be in the device's: {cold.why_not}"
    total = sum(t.nbytes for d in data for t in d.leaves)
    if total < COLD_BYTES:
        yield f"not cold: all inputs together are {total / 1e6:.1f} MB"


def free() -> None:
    """Gives memory that nothing refers to back, so that the next case finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """A backward runs on its forward's stream, and the default stream cannot be captured: all of a run belongs on another."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def threads_for(bytes_of_x: int, most: int | None = None) -> Iterator[int]:
    """One thread for small tensors, whose time is the host's; waking a second thread costs up to ten times as much and hides it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if bytes_of_x < SMALL_BYTES else most or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def copy_rate(device: str, size: int = 256 * 2**20, sets: int | None = None) -> float:
    """Bytes read plus bytes written a second by torch's copy of ``size`` bytes (on a CPU a quarter of it): the ceiling of all figures.

    Rotates over more memory than the cache, or over ``sets``.
    """
    if device == "cpu":
        size //= 4
    sets = sets or rotation(2 * size, device)
    # random bits: equal ones cost less power and so run at a higher clock
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]
    turns = itertools.cycle(zip(targets, sources, strict=True))

    def copy() -> object:
        target, source = next(turns)
        return target.copy_(source)

    with side_stream(device):
        timer = partial(wall_us, copy, 1) if device == "cpu" else captured(copy, max(sets, CALLS)).us
        return 2 * size / (1e-6 * statistics.median(take_turns({"copy": timer}, ROUNDS)["copy"]))
