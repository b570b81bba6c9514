"""How a loop's instructions are counted; and that kernels issue no more than memory allows (bench/hot_loops.py, ``make resources``)."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cuda_resources as resources
from bench import hot_loops

LISTING = """\t\tFunction : _ZN1a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/                   ISETP.NE.AND P0, PT, R1, RZ, PT ;        /* 0x000e220000000800 */
        /*0020*/              @!P0 BRA 0x70 ;                               /* 0x0000000402047981 */
        /*0030*/                   FFMA R2, R3, R3, R2 ;
        /*0040*/                   FFMA R2, R4, R4, R2 ;
        /*0050*/                   MUFU.RCP R5, R2 ;
        /*0060*/                   BRA 0x80 ;
        /*0070*/              @P1  FADD R2, R2, R3 ;
        /*0080*/                   FFMA R2, R3, R3, R2 ;
        /*0090*/                   BRA P2, 0xb0 ;
        /*00a0*/                   CALL.REL.NOINC 0xd0 ;
        /*00b0*/               @P3 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   RET.REL.NODEC R2 0x0 ;
\t\tFunction : _ZN1b
        /*0000*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def code() -> list[hot_loops.Instruction]:
    found = dict(hot_loops.functions(LISTING.splitlines()))
    assert [at.name for at in found["_ZN1b"]] == ["EXIT"]
    return found["_ZN1a"]


def test_a_listing_becomes_a_graph(code: list[hot_loops.Instruction]) -> None:
    assert [(i, at.target) for i, at in enumerate(code) if at.target is not None] == [(2, 7), (6, 8), (9, 11), (11, 1)]
    assert [i for i, at in enumerate(code) if not at.falls_through] == [6, 10, 12, 13]
    assert hot_loops.loops(code) == [(1, 11)]
    assert hot_loops.count(code, (1, 11), "FFMA") == 3


@pytest.mark.parametrize(
    ("need", "issued"),
    [
        ({}, 6),  # past the two FFMA
        ({"FFMA": 1}, 6),
        ({"FADD": 1}, 6),
        ({"FFMA": 2}, 9),
        ({"FFMA": 3, "MUFU": 1}, 9),
        ({"FFMA": 3, "FADD": 1}, None),  # on different ways
        ({"CALL": 1}, None),  # does not come back
    ],
)
def test_the_shortest_way_that_does_the_work(code: list[hot_loops.Instruction], need: dict[str, int], issued: int | None) -> None:
    assert hot_loops.shortest_way(code, (1, 11), need) == issued


def test_what_memory_allows() -> None:
    """33.4e12 instructions and 4.8e12 bytes a second."""
    assert hot_loops.allowed("single_pass bf16 wide/rows relu") == pytest.approx(27.9, abs=0.1)
    assert hot_loops.allowed("grad_single_pass fp32 wide/rows relu") == pytest.approx(83.6, abs=0.1)


def test_a_kernel_without_such_a_loop_is_an_error(code: list[hot_loops.Instruction]) -> None:
    with pytest.raises(ValueError, match="no loop does"):
        hot_loops.count_loops("single_pass fp32 wide/rows relu", code, 1)


# ------------------------------------------------------------------------------------------------------- the baseline
@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    found = hot_loops.read_baseline()
    assert found["kernels"], "bench/results/hot-loops.json is missing; run: make resources"
    return found


def test_every_kernel_is_there(baseline: dict[str, Any]) -> None:
    assert set(baseline["kernels"]) == {name for name in resources.read_baseline()["kernels"] if hot_loops.looked_at(name)}
    assert len(baseline["kernels"]) == 2 * 3 * 2 * 3  # directions, types, views, activations


def test_no_more_than_memory_allows(baseline: dict[str, Any]) -> None:
    above = {name: numbers for name, numbers in baseline["kernels"].items() if sum(numbers) > hot_loops.allowed(name)}
    assert set(above) == set(baseline["above"]), above
    assert all(baseline["above"].values()), "with a reason"
