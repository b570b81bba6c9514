"""What is counted of known patterns: exact, the same in every order, and at its minimum where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .machine import Machine, machine

ORDERS = [("forward", 0), ("reverse", 0), ("starve", 1), ("starve", 2)]


@pytest.fixture(scope="module")
def patterns() -> Iterator[Machine]:
    yield from machine("samples.cpp")


def counted(patterns: Machine, name: str, count: int, order: str = "forward", seed: int = 0, races: bool = False) -> dict[str, Any]:
    assert patterns.mode(order, seed, races, traffic=True).run("run_pattern", name, count) == 0, patterns.message
    return patterns.report


@pytest.mark.parametrize(
    ("name", "requests", "ratio"),
    [
        ("copy_packs", 4096 // 128, 1),
        ("copy_scalars", 4096 // 32, 1),
        ("copy_strided", 4096 // 32, 8),
        ("copy_by_async", 4096 // 128, 1),
        ("copy_by_bulk", 16, 1),
        ("copy_with_barriers", 4096 // 32, 1),
        ("copy_by_turns", 4096 // 32, 1),
    ],
)
def test_copy_of_4096(patterns: Machine, name: str, requests: int, ratio: int) -> None:
    counted(patterns, name, 4096)
    size, sectors = 4 * 4096, 4096 // 8
    asked = [requests, size, ratio * sectors, sectors]
    assert patterns.counts("x") == asked + [0] * 4
    stores = 4096 // 128 if name == "copy_by_async" else requests
    assert patterns.counts("y") == [0] * 4 + [stores, *asked[1:]]
    assert patterns.counts("") == [*asked, stores, *asked[1:]]
    assert patterns.counts("z") == [0] * 8


def test_partial_vectors(patterns: Machine) -> None:
    """103 elements: 25 packs of the first warp, and three scalars of its last lane."""
    counted(patterns, "copy_packs", 103)
    assert patterns.counts("x") == [1 + 3, 412, 13 + 3, 13, 0, 0, 0, 0]


def test_partial_warps(patterns: Machine) -> None:
    counted(patterns, "copy_scalars", 70)
    assert patterns.counts("x") == [3, 280, 4 + 4 + 1, 9, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["copy_triangle_by_block", "copy_triangle_by_warp"])
def test_lanes_that_come_late(patterns: Machine, name: str) -> None:
    """Rows of 1, 2, ... elements are requests of their own, although lanes visit the line a different number of times."""
    counted(patterns, name, 300)
    begins = [row * (row - 1) // 2 for row in range(1, 26)]
    rows = [range(begin, min(begin + row, 300)) for row, begin in enumerate(begins, 1) if begin < 300]
    sectors = sum(len({i // 8 for i in row}) for row in rows)
    assert patterns.counts("x") == [len(rows), 1200, sectors, 38, 0, 0, 0, 0]


@pytest.mark.parametrize("count", [4096, 4000, 1001, 103, 1])
@pytest.mark.parametrize("name", ["copy_packs", "copy_scalars", "copy_strided", "copy_with_barriers"])
def test_same_in_every_order(patterns: Machine, name: str, count: int) -> None:
    reports = [counted(patterns, name, count, order, seed, races) for order, seed in ORDERS for races in (False, True)]
    assert all(report == reports[0] for report in reports)
    assert reports[0]["tensors"]["x"]["read_bytes"] == reports[0]["tensors"]["y"]["write_bytes"] == 4 * count


@pytest.mark.parametrize("name", ["normalize", "pipeline", "bulk", "whole_grid", "cluster_mean", "last_block"])
def test_same_in_every_order_across_barriers(patterns: Machine, name: str) -> None:
    reports = []
    for order, seed in ORDERS:
        assert patterns.mode(order, seed, traffic=True).run("run_sample", name) == 0, patterns.message
        reports.append(patterns.report)
    assert all(report == reports[0] for report in reports)


def test_reread_is_counted_each_time(patterns: Machine) -> None:
    patterns.mode(traffic=True).run("run_sample", "normalize")
    requests, size, sectors, distinct, *writes = patterns.counts("x")
    assert (requests, size, sectors, distinct) == (3 * 16, 3 * 8192, 3 * 256, 256)
    assert writes == [0] * 4


def test_sectors_are_distinct_over_launches(patterns: Machine) -> None:
    patterns.mode(traffic=True)
    for _ in range(3):
        assert patterns.run("run_pattern", "copy_packs", 4096) == 0
    assert patterns.counts("x")[2:4] == [3 * 512, 512]
    report = patterns.report
    assert report["launches"] == len(report["kernels"]) == 3
    first = report["kernels"][0]
    assert (first["kernel"], first["blocks"], first["threads"], first["cluster"], first["cooperative"]) == ("copy_packs", 3, 64, 1, False)
    assert [kernel["tensors"]["x"]["read_distinct"] for kernel in report["kernels"]] == [512] * 3


def test_launches_are_counted_apart(patterns: Machine) -> None:
    assert patterns.mode(traffic=True).library.run_twice() == 0
    assert [kernel["tensors"]["x"]["read_requests"] for kernel in patterns.report["kernels"]] == [1024 // 32, 1024 // 128]
    assert patterns.counts("x")[:4] == [1024 // 32 + 1024 // 128, 2 * 4096, 2 * 128, 128]


@pytest.mark.parametrize(
    ("name", "requests", "wavefronts", "least"),
    [
        ("transpose_conflicts", 64, 32 + 32 * 32, 64),
        ("transpose_padded", 64, 64, 64),
        ("shared_packs", 4, 2 * 4 + 2 * 4, 2 * 4 + 2),
    ],
)
def test_bank_conflicts(patterns: Machine, name: str, requests: int, wavefronts: int, least: int) -> None:
    assert counted(patterns, name, 4096)["shared"] == {"requests": requests, "wavefronts": wavefronts, "least_wavefronts": least}


def test_nothing_is_counted_unless_asked(patterns: Machine) -> None:
    assert patterns.mode().run("run_pattern", "copy_packs", 4096) == 0
    report = patterns.report
    assert (report["launches"], report["tensors"], report["kernels"]) == (1, {}, [])
