"""Right kernels are right in every order, and not without any one of their barriers and waits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from .machine import Machine, machine

# How many barriers and waits each executes
SAMPLES = {"normalize": 2, "warp_permutation": 4, "pipeline": 3, "bulk": 4, "whole_grid": 3, "cluster_mean": 3, "last_block": 0}
MODES = [("reverse", 0), ("starve", 1), ("starve", 2)]


@pytest.fixture(scope="module")
def samples() -> Iterator[Machine]:
    yield from machine("samples.cpp")


@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("order", ["forward", "reverse", "starve"])
@pytest.mark.parametrize("name", SAMPLES)
def test_right_in_every_order(samples: Machine, name: str, order: str, races: bool) -> None:
    for seed in range(5):
        status = samples.mode(order, seed, races).run("run_sample", name)
        assert (status, samples.message) == (0, "")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_barrier_is_needed(samples: Machine, name: str) -> None:
    samples.mode().run("run_sample", name)
    sites = samples.sites
    assert len(sites) == SAMPLES[name]
    for site in sites:
        samples.skip(Path(site["file"]).name, site["line"])
        noticed = [samples.mode(order, seed, races=True).run("run_sample", name) != 0 for order, seed in MODES]
        samples.skip()
        assert any(noticed), site
    assert samples.mode("starve", 1, races=True).run("run_sample", name) == 0


@pytest.mark.parametrize("order", ["forward", "reverse", "starve"])
def test_launches_follow_each_other(samples: Machine, order: str) -> None:
    assert samples.mode(order, races=True).library.run_twice() == 0, samples.message


def traced(samples: Machine, order: str, seed: int = 0, blocks: int = 6, threads: int = 96, cooperative: bool = False) -> list[int]:
    out = (ctypes.c_int * (2 * blocks * threads))()
    assert samples.mode(order, seed).library.run_trace(blocks, threads, cooperative, out) == 0
    return list(out)


def by_block(trace: list[int], threads: int = 96) -> dict[int, tuple[list[int], list[int]]]:
    """Of each block its threads in order of time, before and after the barrier."""
    ran: dict[int, list[int]] = {}
    for who in trace:
        ran.setdefault(who // 1000, []).append(who % 1000)
    return {block: (order[:threads], order[threads:]) for block, order in ran.items()}


@pytest.mark.parametrize("cooperative", [False, True])
def test_order_forward_and_reverse(samples: Machine, cooperative: bool) -> None:
    forward = traced(samples, "forward", cooperative=cooperative)
    assert list(by_block(forward).items()) == [(b, (list(range(96)), list(range(96)))) for b in range(6)]
    backward = list(reversed(range(96)))
    reverse = traced(samples, "reverse", cooperative=cooperative)
    assert list(by_block(reverse).items()) == [(b, (backward, backward)) for b in reversed(range(6))]


def test_order_starve(samples: Machine) -> None:
    trace = traced(samples, "starve", 1)
    assert trace == traced(samples, "starve", 1)
    assert trace != traced(samples, "starve", 2)
    blocks = by_block(trace)
    assert all(sorted(part) == list(range(96)) for parts in blocks.values() for part in parts)
    # Blocks interleave, four at a time at most
    assert sum(a // 1000 != b // 1000 for a, b in pairwise(trace)) > 5
    last = {who // 1000: i for i, who in enumerate(trace)}
    first = {who // 1000: i for i, who in reversed(list(enumerate(trace)))}
    assert max(sum(first[b] <= i <= last[b] for b in blocks) for i in range(len(trace))) in (2, 3, 4)
    # Lanes too have orders of their own
    assert len({before[0] % 32 for before, _ in blocks.values()}) > 1


def test_priorities_are_drawn_anew_for_each_block(samples: Machine) -> None:
    blocks = by_block(traced(samples, "starve", 5, blocks=40, threads=128), 128)
    orders = {tuple(dict.fromkeys(thread // 32 for thread in before)) for before, _ in blocks.values()}
    assert len(orders) > 4  # there are four places for blocks
    assert set(list(blocks)[:4]) != {0, 1, 2, 3}


def test_each_launch_has_another_order(samples: Machine) -> None:
    out = [(ctypes.c_int * 256)() for _ in range(2)]
    samples.mode("starve", 1)
    for trace in out:
        assert samples.library.run_trace(2, 64, False, trace) == 0
    assert list(out[0]) != list(out[1])


def test_cooperative_grid_must_fit(samples: Machine) -> None:
    """Four blocks of 4 KB, and 1 KB that the system takes of each."""
    samples.mode()
    for processors, of_block, of_processor, status in [
        (1, 4096, 4 * 5120, 0), (1, 4096, 4 * 5120 - 1, 720), (2, 4096, 2 * 5120, 0), (132, 4095, 233472, 1),
    ]:  # fmt: skip
        samples.library.nf_emulation_limits(processors, of_block, of_processor)
        assert samples.run("run_sample", "whole_grid") == status
        assert status == 0 or "kernel whole_grid" in samples.message
    samples.library.nf_emulation_limits(132, 232448, 233472)


@pytest.mark.parametrize("name", SAMPLES)
def test_fibers_of_other_processors(name: str) -> None:
    """Those of ucontext, where there is no assembly for the processor."""
    for portable in machine("samples.cpp", "-DNF_UCONTEXT"):
        for order in ("forward", "starve"):
            assert portable.mode(order, races=True, traffic=True).run("run_sample", name) == 0, portable.message
        assert b"swapcontext" in Path(portable.library._name).read_bytes()


def test_a_skipped_barrier_shows_without_the_race_check_too(samples: Machine) -> None:
    """Starving alone finds the barrier before a second use of scratch, which a fair scheduler would not."""
    samples.mode().run("run_sample", "normalize")
    reuse = samples.sites[1]
    samples.skip("samples.cpp", reuse["line"])
    found = [samples.mode("starve", seed).run("run_sample", "normalize") for seed in range(8)]
    samples.skip()
    assert 1 in found
