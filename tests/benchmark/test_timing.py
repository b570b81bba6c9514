"""How calls are timed: turns, medians, what stays alive, and the way to a CUDA graph and back, on a CPU that plays the GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from normfused.benchmark import timing
from normfused.benchmark.cases import Case
from normfused.benchmark.timing import Figures, call_of, captured, inputs, measure, repeated, spread, take_turns

CASE = Case("batch", (2, 4, 3, 3), dtype=torch.float32)
SUM = Case("rms", (3, 4), residual="pre_norm", dtype=torch.float32)


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
        self.captures: list[Any] = []
        self.replays = 0
        gpu = self

        class Graph:
            def __init__(self, keep_graph: bool = False) -> None:
                assert keep_graph, "its nodes are counted"

            def capture_begin(self, pool: Any = None) -> None:
                assert not gc.isenabled()
                gpu.captures.append(pool)

            def capture_end(self) -> None:
                if gpu.refuses:
                    raise RuntimeError("capture failed due to a previous error")

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    for name in ("CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
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
        assert figures.device_us == figures.device_warm_us == 1e3 * gpu.graph_ms / timing.CALLS
        assert figures.spread == 0
        assert figures.launches == 2
        assert figures.peak_bytes == 4000
        assert figures.note == "not cold: all inputs together are 0.0 MB"
    assert gpu.captures == ["pool"] * 4, "cold and warm of each, one pool of memory"
    assert gpu.replays == 2 * 2 * 6, "two graphs, two modules, five rounds and one to warm up"


def test_what_cannot_be_captured_is_called_and_says_why(gpu: Gpu) -> None:
    gpu.refuses = "yes"
    calls = []

    def call() -> None:
        calls.append(len(gpu.captures))
        if gpu.captures and len(calls) == 4:  # the first within the capture
            raise ValueError("operation not permitted when stream is capturing\nmore")

    found = captured(call, times=5)
    assert found.why_not == "operation not permitted when stream is capturing"
    assert found.launches is None
    before = len(calls)
    assert found.us() == 1e3 * gpu.graph_ms / 5
    assert len(calls) == before + 5


def test_the_note_of_an_uncaptured_call(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refuses = "yes"
    monkeypatch.setattr(timing, "launches_seen", lambda call: 7)
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
