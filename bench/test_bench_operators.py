"""The same cases, providers and calls as ``python -m normfused bench``, one by one, for pytest-benchmark's statistics and comparisons.

Providers do not take turns here, so that the command's figures are the ones to quote. A provider that is wrong fails and is not timed.
"""

from __future__ import annotations

import time
from functools import cache, lru_cache

import pytest
import torch

from normfused.benchmark import accuracy, timing
from normfused.benchmark.accuracy import Errors
from normfused.benchmark.cases import MATRIX, QUICK, Case
from normfused.benchmark.providers import Provider, all_providers, prepare
from normfused.benchmark.results import PASSES


@cache
def _origin() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def device_clock() -> float:
    """Seconds on a GPU: of an event behind all work queued so far."""
    first, now = _origin(), torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return first.elapsed_time(now) / 1e3


@lru_cache(64)
def errors(provider: Provider, case: Case, device: str) -> Errors:
    return accuracy.errors(provider, case, device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = str(config.getoption("--device"))
    providers = [p for p in all_providers(device) if p.absent is None]
    if config.getoption("benchmark_disable", False):  # a smoke test: compiling everything would take minutes
        providers = [p for p in providers if not p.name.startswith("compile")]
    clock = pytest.mark.benchmark(timer=time.perf_counter if device == "cpu" else device_clock)
    combinations = [
        pytest.param(case, provider, direction, marks=clock, id=f"{case.name}-{provider.name}-{direction}")
        for case in (QUICK if config.getoption("--quick") else MATRIX)
        for direction in PASSES
        for provider in providers
        if provider.refuses(case, device) is None
    ]
    metafunc.parametrize(("case", "provider", "direction"), combinations)


def test_operators(benchmark, case: Case, provider: Provider, direction: str, device: str, on_a_side_stream: None) -> None:
    benchmark.group = f"{case.name} {direction}"
    found = errors(provider, case, device)
    if found.wrong:
        pytest.fail(f"{provider.name} is wrong: {found.of_allowed:.3g} times the allowed error in {found.worst}")
    data = timing.inputs(case, device)
    call = timing.call_of(prepare(provider, case, device), data, direction)
    calls = 1 if device == "cpu" else max(len(data), timing.CALLS)
    with timing.threads_for(case.tensor_bytes):
        run = call if device == "cpu" else timing.captured(call, calls, len(data)).run
        small = device == "cpu" and case.tensor_bytes < timing.SMALL_BYTES
        benchmark.pedantic(run, rounds=20, iterations=20 if small else 1, warmup_rounds=2)
    benchmark.extra_info.update(
        case=case.name, provider=provider.name, direction=direction, calls=calls, error_of_allowed=found.of_allowed
    )  # fmt: skip
