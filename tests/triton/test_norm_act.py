"""Every scope, rule, layout, route, type, activation and residual against the reference, each two of them together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfused.backends.triton.plan import Limits
from normfused.problem import BATCH_INSTANCE, CHANNEL, POSITION, PRE_NORM, RMS, SAMPLE_GROUP, STANDARD

from ..support import cases
from .cases import KINDS, LOOPED, SMALL, Case, pairwise

FACTORS = {"kind": list(KINDS), **cases.FACTORS, "shape": [(2, 6, 5, 3), (3, 6, 7), (1, 6, 2, 2, 9), (5, 6), (3, 6, 1, 1)]}
ROWS = pairwise(FACTORS, cases.allowed)


def _case(row: dict[str, Any], device: torch.device, **more: Any) -> Case:
    options = {**cases.options(row), "device": device, **more}
    looped = options["route"] == "two_pass" and options["scope"] == POSITION
    return Case(**options, limits=LOOPED if looped else SMALL)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(str(v).replace("torch.", "") for v in r.values()))
def test_pairs(row: dict[str, Any], device: torch.device) -> None:
    _case(row, device, seed=ROWS.index(row)).check()


LENGTHS = st.lists(st.integers(1, 7), max_size=3)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(data: st.DataObject, device: torch.device) -> None:
    draw = data.draw
    scope = draw(st.sampled_from([CHANNEL, SAMPLE_GROUP, POSITION]))
    groups, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 4)), groups * width, *draw(LENGTHS))
    with_samples = [BATCH_INSTANCE] if math.prod(shape[2:]) > 1 else []
    rule = draw(st.sampled_from([STANDARD, *with_samples] if scope == CHANNEL else [STANDARD, RMS]))
    tile = 1 << draw(st.integers(2, 7))
    rows = tile * draw(st.sampled_from([1, 64]))
    limits = Limits(draw(st.integers(1, 3)), tile, 1024, 1024, rows, rows, draw(st.sampled_from([1, 4])))
    Case(
        scope, rule, shape, groups if scope == SAMPLE_GROUP else 1,
        layout=draw(st.sampled_from(["nchw", "nhwc"])) if len(shape) > 2 else "nchw",
        act=draw(st.sampled_from(["relu", "silu", "prelu"])),
        residual=draw(st.sampled_from([None, "pre_act", PRE_NORM if scope == POSITION else "post_act"])),
        route=draw(st.sampled_from(["single_pass", "two_pass"])), limits=limits, device=device, dtype=torch.float64,
        seed=draw(st.integers(0, 99)), rule_weights=shape[1] if rule == BATCH_INSTANCE else 0,
    ).check()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
def test_default_limits(kind: str, route: str, device: torch.device) -> None:
    """Tiles as on a GPU, mostly empty here."""
    Case(shape=(2, 6, 9), act="gelu", route=route, limits=None, device=device, **KINDS[kind]).check()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["channel tracked", "batch instance", "group", "filter response, eps each", "position"])
def test_long_offsets_are_the_same(kind: str, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of tensors whose tiles span 2^31 elements, on a small one."""
    from dataclasses import replace

    from normfused.backends.triton import host

    def wide(*args: Any, **options: Any) -> Any:
        plan = before(*args, **options)
        parts = {n: replace(t, wide=True) for n in ("stream", "sets", "rows") if (t := getattr(plan, n)) is not None}
        return replace(plan, **parts)

    before = host.plan_for
    monkeypatch.setattr(host, "plan_for", wide)
    for route in ("single_pass", "two_pass"):
        limits = LOOPED if kind == "position" and route == "two_pass" else SMALL
        Case(layout=layout, route=route, limits=limits, device=device, **KINDS[kind]).check()
