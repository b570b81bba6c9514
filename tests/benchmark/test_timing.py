"""How calls are timed: turns, medians, what stays alive, and the way to a CUDA graph and back, on a CPU that plays the GPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from normfused.benchmark import timing
from normfused.benchmark.cases import Case
from normfused.benchmark.timing import Figures, Inputs, captured, in_turn, inputs, measure, passes, repeated, spread, take_turns

CASE = Case("batch", (2, 4, 3, 3), dtype=torch.float32)
SUM = Case("rms", (3, 4), residual="pre_norm", dtype=torch.float32)


def call_of(module: nn.Module, data: list[Inputs], direction: str) -> timing.Call:
    return in_turn(passes(module, data, direction))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * (x + residual), x + residual


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


# ---------------------------------------------------------------------------------------------------------------- turns
def test_turns_rotate_and_the_first_round_is_not_kept() -> None:
    seen: list[str] = []
    times = iter(range(100))

    def timer(name: str) -> Any:
        return lambda: seen.append(name) or float(next(times))

    samples = take_turns({name: timer(name) for name in "abc"}, rounds=4)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]
    assert samples == {"a": [5.0, 7.0, 9.0, 14.0], "b": [3.0, 8.0, 10.0, 12.0], "c": [4.0, 6.0, 11.0, 13.0]}


def test_no_timer_no_sample() -> None:
    assert take_turns({}, 3) == {}


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread([10.0, 20.0, 30.0, 40.0, 50.0]) == pytest.approx(20 / 30)
    assert spread([7.0] * 5) == 0
    assert spread([7.0]) is None


# ---------------------------------------------------------------------------------------------------------------- calls
def test_sets_exceed_the_cache_on_a_gpu() -> None:
    assert timing.rotation(100 * 2**20, "cuda") == 3
    assert timing.rotation(2**40, "cuda") == 2, "never the same tensors again"
    assert timing.rotation(64, "cuda") == timing.MOST_SETS
    assert timing.rotation(64, "cpu") == 1


def test_sets_differ_and_are_taken_in_turn() -> None:
    data = inputs(CASE, "cpu", sets=3)
    call = call_of(Scaled(), data, "forward")
    results = [call() for _ in range(6)]
    for i, got in enumerate(results):
        assert torch.equal(got, 3 * data[i % 3].leaves[0])  # type: ignore[arg-type]
    assert not torch.equal(results[0], results[1])  # type: ignore[arg-type]


def test_backward_alone_equals_forward_and_backward() -> None:
    data, module = inputs(CASE, "cpu", sets=2), Scaled()
    alone, both = call_of(module, data, "backward"), call_of(module, data, "forward_backward")
    for _ in range(3):  # the second time round the saved tensors must still be there
        dx, dweight = alone()  # type: ignore[misc]
        _, gradients = both()  # type: ignore[misc]
        assert torch.equal(dx, gradients[0])
        assert torch.equal(dweight, gradients[1])


def test_a_second_output_has_a_gradient_of_its_own() -> None:
    (given,) = inputs(SUM, "cpu")
    dy, dh = given.gradients
    dx, dresidual = call_of(Sum(), [given], "backward")()  # type: ignore[misc]
    assert torch.allclose(dx, 2 * dy + dh)
    assert torch.equal(dx, dresidual)
    assert dh.data_ptr() != dy.data_ptr()


def test_eval_keeps_nothing_for_a_backward() -> None:
    data = inputs(CASE, "cpu", training=True)
    assert call_of(Scaled().train(), data, "forward")().requires_grad  # type: ignore[attr-defined]
    assert not call_of(Scaled().eval(), data, "forward")().requires_grad  # type: ignore[attr-defined]


def test_results_live_on_as_long_as_others_could_take_their_place() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def call() -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        result = torch.zeros(3)
        alive.append(weakref.ref(result))
        return result

    repeated(call, 10, kept=4)()
    assert most == 4
    assert not any(ref() is not None for ref in alive), "and no longer than the calls"


# ---------------------------------------------------------------------------------------------------------------- on a CPU
def test_one_that_fails_does_not_stop_the_others() -> None:
    found = measure({"broken": Broken(), "right": Scaled()}, inputs(CASE, "cpu"), "forward_backward", "cpu", rounds=5)
    right = found["right"]
    assert isinstance(found["broken"], ValueError)
    assert isinstance(right, Figures)
    assert right.host_us is not None
    assert right.host_us > 0
    assert right.spread is not None
    assert right.device_us is None, "there is no device"


def test_small_tensors_are_timed_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with timing.threads_for(timing.SMALL_BYTES - 1) as threads:
            assert threads == torch.get_num_threads() == 1
        with timing.threads_for(timing.SMALL_BYTES) as threads:
            assert threads == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_copy_rate_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "wall_us", lambda run, calls: (run(), 100.0)[1])
    assert timing.copy_rate("cpu", size=4 * 10**6) == pytest.approx(2e6 / 100e-6)


# ------------------------------------------------------------------------------------------------- as on a GPU, without one
class Gpu:
    """Stands in for torch.cuda: a captured graph takes ``graph_ms``, whatever is in it; calls are counted."""

    graph_ms = 4.0
    refuses: str | None = None

    def __init__(self) -> None:
        self.captures: list[int] = []  # the pool of each
        self.underway: int | None = None  # as the allocator sees it
        self.released: list[int] = []
        self.replays = 0
        gpu = self

        class Graph:
            def __init__(self, keep_graph: bool = False) -> None:
                assert keep_graph, "its nodes are counted"

            def capture_begin(self, pool: int) -> None:
                assert not gc.isenabled()
                assert gpu.underway is None, "beginAllocateToPool: already recording to mempool_id"
                gpu.underway = pool
                gpu.captures.append(pool)

            def capture_end(self) -> None:
                if gpu.refuses:
                    raise RuntimeError("capture failed due to a previous error")
                gpu.underway = None

            def instantiate(self) -> None: ...

            def replay(self) -> None:
                gpu.replays += 1

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None: ...

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: object) -> float:
                return gpu.graph_ms

        self.CUDAGraph, self.Event = Graph, Event

    def end_allocate(self, device: int, pool: int) -> None:
        if self.underway != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway = None

    def empty_cache(self) -> None:
        assert self.underway is None, "captures_underway.empty() INTERNAL ASSERT FAILED"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    for name in ("CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    handles = itertools.count(1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "empty_cache", gpu.empty_cache)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 10))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", gpu.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: gpu.released.append(pool), raising=False)
    monkeypatch.setattr(timing, "spin_up", lambda seconds: None)
    monkeypatch.setattr(timing, "launches_seen", lambda call: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    monkeypatch.setattr(timing, "launches_in", lambda graph: 2 * timing.CALLS)
    yield gpu
    assert gc.isenabled()


def test_device_time_is_of_one_call_in_the_graph(gpu: Gpu) -> None:
    data = inputs(CASE, "cpu", sets=timing.CALLS)
    found = measure({"one": Scaled(), "other": Scaled()}, data, "backward", "cuda", rounds=5)
    for figures in found.values():
        assert isinstance(figures, Figures)
        assert figures.device_us == 1e3 * gpu.graph_ms / timing.CALLS
        assert figures.device_warm_us == 1e3 * gpu.graph_ms / timing.FEWEST_CALLS, "calls of 4 ms fill a sample soon"
        assert figures.spread == 0
        assert figures.launches == 2
        assert figures.peak_bytes == 4000
        assert figures.note == "not cold: all inputs together are 0.0 MB"
    assert gpu.captures == [1] * 5, "cold and warm of each, and what holds the pool of memory that they share"
    assert gpu.replays == 2 * 2 * 6, "two graphs, two modules, five rounds and one to warm up"


def test_a_sample_uses_every_set_as_often() -> None:
    assert timing.calls_for(2.0) == timing.CALLS
    assert timing.calls_for(100.0) == 10
    assert timing.calls_for(5000.0) == timing.FEWEST_CALLS
    assert timing.calls_for(100.0, sets=3) == 12
    assert timing.calls_for(5000.0, sets=2) == 4
    assert timing.calls_for(2.0, sets=256) == 256


def test_what_a_graph_reads_lives_as_long_as_the_graph(gpu: Gpu) -> None:
    class Kept: ...

    kept = Kept()
    alive = weakref.ref(kept)

    def call(kept: Kept = kept) -> object:
        return kept

    graph = captured(call)
    del call, kept
    assert alive() is not None
    del graph
    assert alive() is None


def test_a_failed_capture_leaves_the_allocator_as_it_was(gpu: Gpu) -> None:
    pool = timing.Pool(torch.zeros(1))
    gpu.refuses = "yes"
    assert captured(lambda: None, pool=pool).why_not is not None
    gpu.empty_cache()
    assert 1 in gpu.released
    gpu.refuses = None
    assert captured(lambda: None, pool=pool).why_not is None
    assert 1 not in gpu.captures[2:], "nothing more is captured into the pool of the one that failed"


def test_a_capture_that_ended_well_is_not_given_back_twice(gpu: Gpu) -> None:
    def call() -> None:
        if gpu.captures:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert captured(call).why_not == "CUDA out of memory."
    assert gpu.released == []


def test_one_that_fails_while_it_is_timed_does_not_stop_the_others(gpu: Gpu) -> None:
    class Later(Scaled):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 100:
                raise RuntimeError("out of memory")
            return super().forward(x)

    found = measure({"later": Later(), "right": Scaled()}, inputs(CASE, "cpu", sets=2), "forward", "cuda", rounds=50)
    assert isinstance(found["right"], Figures)
    assert found["right"].host_us is not None
    error = found["later"]
    assert isinstance(error, RuntimeError)
    assert error.__traceback__ is None, "its frames would hold tensors"


def test_what_cannot_be_captured_is_called_and_says_why(gpu: Gpu) -> None:
    gpu.refuses = "yes"
    calls = []

    def call() -> None:
        calls.append(len(gpu.captures))
        if len(calls) == 4:  # the first within the capture
            raise ValueError("operation not permitted when stream is capturing\nmore")

    found = captured(call, times=5)
    assert found.why_not == "operation not permitted when stream is capturing"
    assert found.launches is None
    before = len(calls)
    assert found.us() == 1e3 * gpu.graph_ms / 5
    assert len(calls) == before + 5


def test_the_note_of_an_uncaptured_call(gpu: Gpu) -> None:
    gpu.refuses = "yes"
    found = measure({"one": Scaled()}, inputs(CASE, "cpu", sets=2), "forward", "cuda", rounds=1)["one"]
    assert isinstance(found, Figures)
    assert found.note is not None
    assert "no CUDA graph" in found.note
    assert "capture failed" in found.note
    assert found.launches == 7


def test_one_that_fails_on_a_gpu_leaves_no_timer(gpu: Gpu) -> None:
    found = measure({"broken": Broken(), "right": Scaled()}, inputs(CASE, "cpu", sets=2), "forward", "cuda", rounds=2)
    assert isinstance(found["broken"], ValueError)
    assert isinstance(found["right"], Figures)
    assert found["right"].host_us is not None
