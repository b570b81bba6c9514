"""Every case by every provider, forward and forward+backward, grouped by case; a provider that is wrong is reported, not timed."""

from __future__ import annotations

import itertools

import pytest
import torch

from normfused.benchmark.accuracy import error_against_float64
from normfused.benchmark.cases import MATRIX, QUICK, Case
from normfused.benchmark.providers import Provider, all_providers, prepare, saved_bytes, step, tensors
from normfused.benchmark.timing import SMALL_BYTES, clock, graphed, host_seconds, rotation, threads_for


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    quick, device = config.getoption("--quick"), str(config.getoption("--device"))
    providers = [p for p in all_providers(device) if p.absent is None]
    if config.getoption("benchmark_disable", False):  # a smoke test: compiling everything would take minutes
        providers = [p for p in providers if p.name != "compile"]
    combinations = [
        pytest.param(case, provider, direction, id=f"{case.name}-{provider.name}-{direction}")
        for case in (QUICK if quick else MATRIX)
        for direction in ("forward", "forward_backward")
        for provider in providers
        if provider.refuses(case, device) is None
    ]
    metafunc.parametrize(("case", "provider", "direction"), combinations)


@pytest.mark.benchmark(timer=clock)
def test_norm_act(benchmark, case: Case, provider: Provider, direction: str, device: str, ceiling: float, request) -> None:
    benchmark.group = f"{case.name} {direction}"
    error = error_against_float64(provider, case, device)
    if not error <= 1:
        pytest.fail(f"{provider.name} is wrong: {error:.3g} times the allowed error")
    module = prepare(provider, case, device)
    sets = []
    for seed in range(rotation(case.floor_bytes("forward_backward"), device)):
        x, residual, dy = tensors(case, device, seed)
        for t in (x, residual):
            if t is not None:
                t.requires_grad_(direction != "forward")
        sets.append((x, residual, dy))
    turns = itertools.cycle(sets)

    def forward() -> object:
        x, residual, _ = next(turns)
        with torch.no_grad():
            return module(x) if residual is None else module(x, residual)

    def forward_backward() -> object:
        return step(module, *next(turns))

    call = forward if direction == "forward" else forward_backward
    for _ in range(3):  # compilation and caches, outside the rounds
        call()
    kept = None
    if direction != "forward":
        x, residual, _ = sets[0]
        kept = saved_bytes(module, x, residual)
    small, timed, calls, host, how = case.tensor_bytes < SMALL_BYTES, call, 1, None, "wall clock"
    if device == "cuda":
        host, calls = 1e6 * host_seconds(call), max(20, len(sets))
        timed, reason = graphed(call, calls)
        how = f"{calls} calls in a CUDA graph" if reason is None else f"{calls} calls, the host's time in them; no CUDA graph: {reason}"
        benchmark.pedantic(timed, rounds=20, warmup_rounds=2)
    else:
        with threads_for(case.tensor_bytes) as threads:
            benchmark.pedantic(timed, rounds=60 if small else 20, iterations=20 if small else 1, warmup_rounds=2)
        how += f", {threads} threads"
    moved = case.floor_bytes(direction)
    benchmark.extra_info.update(
        case=case.name, provider=provider.name, direction=direction, error_of_allowed=error, floor_bytes=moved,
        saved_bytes=kept, clock=how, host_us=host,
    )  # fmt: skip
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / calls
        benchmark.extra_info.update(
            median_us=seconds * 1e6, gbps=moved / seconds / 1e9, percent_of_copy=100 * moved / seconds / ceiling, copy_gbps=ceiling / 1e9
        )  # fmt: skip
