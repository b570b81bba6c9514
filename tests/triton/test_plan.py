"""How problems are cut: pure functions, no triton and no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfused.backends import triton as backend
from normfused.backends.triton.plan import Limits, Plan, choose_plan, forced, geometry, plan_for
from normfused.problem import BATCH_INSTANCE, CHANNEL, POSITION, RMS, SAMPLE_GROUP, STANDARD, Problem

H200 = Limits()
MOST_PROGRAMS = 2**31 - 1


def _problem(
    scope: str, N: int, C: int, S: int, groups: int = 1, layout: str = "nchw", dtype: torch.dtype = torch.bfloat16,
    rule: str = STANDARD, batch_statistics: bool = True,
) -> Problem:  # fmt: skip
    return Problem(scope, rule, N, C, S, groups, layout, dtype, torch.device("cuda"), batch_statistics=batch_statistics)


def _covers(p: Problem, plan: Plan) -> None:
    """Tiles cover everything, are powers of 2 within Triton's limit, and the grid is launchable."""
    g, t = plan.geometry, plan.stream
    assert g.outer * g.inner * g.C * g.S == p.N * p.C * p.S
    assert t.s_tiles * t.BS >= g.S > (t.s_tiles - 1) * t.BS
    assert t.chunks * t.TILES >= t.tiles > (t.chunks - 1) * t.TILES
    assert t.programs == g.outer * -(-g.C // t.BC) * t.chunks <= MOST_PROGRAMS
    sizes = [t.BC, t.BS, t.TILES]
    if plan.sets is not None:
        sets = plan.sets
        assert sets.BR >= sets.R
        assert sets.BS >= sets.S
        assert p.count == sets.R * sets.S
        assert sets.programs * sets.BSET >= g.sets
        assert sets.programs <= MOST_PROGRAMS
        sizes += [sets.BSET, sets.BR, sets.BS]
        assert sets.wide or (sets.BSET - 1) * sets.set_stride + (sets.R - 1) * sets.row_stride + (sets.S - 1) * g.sS < 2**31
    if plan.rows is not None:
        rows = plan.rows
        assert rows.BC * rows.BLOCKS_C >= g.C
        assert rows.blocks * rows.BP >= g.S
        assert rows.all_blocks == g.inner * rows.blocks
        sizes += [rows.BP, rows.BC]
    assert all(size == 1 << (size.bit_length() - 1) for size in sizes), sizes
    for elements in (t.BC * t.BS, math.prod(sizes[3:])):
        assert elements <= 2**20


LARGE = st.integers(1, 3000) | st.sampled_from([2**k for k in range(17)])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    scope=st.sampled_from([CHANNEL, SAMPLE_GROUP, POSITION]), N=LARGE, width=st.integers(1, 70), groups=st.integers(1, 64), S=LARGE,
    layout=st.sampled_from(["nchw", "nhwc"]), dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    with_samples=st.booleans(), backward=st.booleans(), route=st.sampled_from([None, "single_pass", "two_pass", "slices"]),
)  # fmt: skip
def test_any_problem_is_covered(
    scope: str, N: int, width: int, groups: int, S: int, layout: str, dtype: torch.dtype, with_samples: bool, backward: bool,
    route: str | None,
) -> None:  # fmt: skip
    rule = BATCH_INSTANCE if scope == CHANNEL and with_samples else STANDARD
    p = _problem(scope, N, width * groups, S, groups if scope == SAMPLE_GROUP else 1, layout, dtype, rule)
    _covers(p, choose_plan(p, H200, backward, route))


@pytest.mark.parametrize(
    ("p", "route"),
    [
        (_problem(CHANNEL, 32, 512, 14 * 14), "single_pass"),
        (_problem(CHANNEL, 32, 256, 56 * 56), "two_pass"),
        (_problem(CHANNEL, 32, 256, 56 * 56, layout="nhwc"), "two_pass"),
        (_problem(CHANNEL, 128, 1024, 1), "single_pass"),
        (_problem(CHANNEL, 2, 3, 8192), "two_pass"),  # it fits, but three programs would do all the work
        (_problem(CHANNEL, 32, 512, 14 * 14, rule=BATCH_INSTANCE), "single_pass"),
        (_problem(CHANNEL, 16, 512, 4 * 4, layout="nhwc", rule=BATCH_INSTANCE), "single_pass"),
        (_problem(CHANNEL, 32, 512, 14 * 14, rule=BATCH_INSTANCE, batch_statistics=False), "single_pass"),
        (_problem(CHANNEL, 32, 256, 56 * 56, rule=BATCH_INSTANCE), "slices"),
        (_problem(CHANNEL, 32, 256, 56 * 56, rule=BATCH_INSTANCE, batch_statistics=False), "slices"),
        (_problem(CHANNEL, 2, 3, 8192, rule=BATCH_INSTANCE), "slices"),
        (_problem(SAMPLE_GROUP, 8, 320, 32 * 32, 32), "single_pass"),
        (_problem(SAMPLE_GROUP, 8, 320, 128 * 128, 32), "two_pass"),
        (_problem(SAMPLE_GROUP, 8, 64, 49, 64), "single_pass"),
        (_problem(SAMPLE_GROUP, 8, 64, 1, 64, rule=RMS), "two_pass"),  # sets of one element have a backward of their own
        (_problem(POSITION, 4096, 4096, 1), "single_pass"),
        (_problem(POSITION, 4096, 65536, 1), "two_pass"),
    ],
)
def test_route(p: Problem, route: str) -> None:
    assert choose_plan(p, H200).route == route


def test_evaluation_has_no_single_pass() -> None:
    p = _problem(CHANNEL, 32, 512, 49, batch_statistics=False)
    assert choose_plan(p, H200, route="single_pass").route == "two_pass"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_rows_are_samples_where_they_have_moments(layout: str) -> None:
    """One row to a sample, whatever the layout; forced apart, it is by steps."""
    p = _problem(CHANNEL, 6, 512, 7 * 3, layout=layout, rule=BATCH_INSTANCE)
    for backward in (False, True):
        sets = choose_plan(p, H200, backward).sets
        assert sets is not None
        assert (sets.R, sets.S, sets.BR, sets.BS, sets.row_stride) == (6, 21, 8, 32, 512 * 21)
        assert sets.set_stride == (1 if layout == "nhwc" else 21)
        assert choose_plan(p, H200, backward, "two_pass").route == "slices"


def test_long_tiles_are_wide() -> None:
    assert choose_plan(_problem(CHANNEL, 1, 64, 2**30), H200).stream.wide is False  # a tile is one channel
    assert choose_plan(_problem(CHANNEL, 2, 2**28, 64, layout="nhwc"), H200).stream.wide
    assert choose_plan(_problem(POSITION, 1, 64, 2**27), H200).rows.wide


def test_small_maps_share_a_program() -> None:
    sets = choose_plan(_problem(SAMPLE_GROUP, 64, 512, 16, 512), H200).sets
    assert sets is not None
    assert sets.BSET > 1
    assert sets.programs >= H200.processors


def test_flat_inputs_have_contiguous_channels() -> None:
    assert geometry(_problem(CHANNEL, 32, 64, 1)).nhwc
    assert geometry(_problem(CHANNEL, 32, 64, 1)).S == 32


def test_forced() -> None:
    p = _problem(SAMPLE_GROUP, 8, 64, 49, 64)
    cpu = Problem(p.scope, p.rule, p.N, p.C, p.S, p.groups, p.layout, p.dtype, torch.device("cpu"))
    with forced("two_pass"):
        assert plan_for(cpu).route == "two_pass"
        with forced("single_pass", Limits(processors=3)):
            assert plan_for(cpu).route == "single_pass"
        assert plan_for(cpu).route == "two_pass"
    assert plan_for(cpu).route == "single_pass"


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "int32" in (backend.unavailable("cuda", torch.int32) or "")
    assert "CUDA" in (backend.unavailable("cpu", torch.float32) or "")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert backend.unavailable("cuda", torch.float32) == "triton is not installed"


def test_importing_the_backend_does_not_import_triton() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None\nimport torch, normfused.backends.triton as t; print(t.unavailable('cuda', torch.int8))"
    )
    assert "int8" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
