"""Right kernels are right in every order, and not without any one of their barriers and waits."""

from __future__ import annotations

from collections.abc import Iterator
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


def test_a_skipped_barrier_shows_without_the_race_check_too(samples: Machine) -> None:
    """Starving alone finds the barrier before a second use of scratch, which a fair scheduler would not."""
    samples.mode().run("run_sample", "normalize")
    reuse = samples.sites[1]
    samples.skip("samples.cpp", reuse["line"])
    found = [samples.mode("starve", seed).run("run_sample", "normalize") for seed in range(8)]
    samples.skip()
    assert 1 in found
