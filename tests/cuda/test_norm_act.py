"""Every scope, rule, layout, route, type, activation and residual against the reference in float64, each two of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfused.problem import CHANNEL, POSITION, PRE_NORM, RMS, SAMPLE_GROUP, STANDARD

from ..support import cases
from .cases import SMALL, TINY, Case, Machine

FACTORS = {
    "kind": list(cases.KINDS),
    **cases.FACTORS,
    # whole vectors, tails, rows that start inside a vector, one position
    "shape": [(2, 6, 5, 3), (3, 6, 7), (2, 6, 4, 2, 4), (4, 24, 8, 8), (40, 6), (3, 6, 1, 1), (2, 6, 33, 31)],
}
ROWS = cases.pairwise(FACTORS, cases.allowed)
IDS = ["-".join(str(v).replace("torch.", "") for v in row.values()) for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_pairs(row: dict[str, Any], device: torch.device) -> None:
    Case(**cases.options(row), seed=ROWS.index(row), device=device).check()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse", "starve"])
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_pairs_in_any_order(row: dict[str, Any], order: str, machine: Machine) -> None:
    with machine.mode(order, seed=ROWS.index(row), races=True):
        Case(**cases.options(row), seed=ROWS.index(row), limits=TINY).check()


LENGTHS = st.lists(st.integers(1, 12), max_size=3)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(data: st.DataObject, device: torch.device) -> None:
    draw = data.draw
    scope = draw(st.sampled_from([CHANNEL, SAMPLE_GROUP, POSITION]))
    rule = STANDARD if scope == CHANNEL else draw(st.sampled_from([STANDARD, RMS]))
    groups, width = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    shape = (draw(st.integers(1, 6)), groups * width, *draw(LENGTHS))
    limits = (draw(st.integers(1, 40)), draw(st.sampled_from([30000, 65536, 232448])), 233472, 2048)
    Case(
        scope, rule, shape, groups if scope == SAMPLE_GROUP else 1,
        layout=draw(st.sampled_from(["nchw", "nhwc"])) if len(shape) > 2 else "nchw",
        act=draw(st.sampled_from(["relu", "silu", "prelu"])),
        residual=draw(st.sampled_from([None, "pre_act", PRE_NORM if scope == POSITION else "post_act"])),
        route=draw(st.sampled_from([None, "single_pass", "two_pass"])), limits=limits, device=device,
        dtype=draw(st.sampled_from([torch.float64, torch.float32])), seed=draw(st.integers(0, 99)),
    ).check()  # fmt: skip


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_limits_of_a_gpu(kind: str, layout: str, device: torch.device) -> None:
    Case(shape=(2, 6, 40, 24), layout=layout, act="gelu", limits=None, device=device, **cases.KINDS[kind]).check()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("kind", "shape", "layout"),
    [
        ("one group", (2, 9000, 3), "nhwc"),  # a group wider than the threads of a block have columns
        ("group", (1, 10002, 2), "nhwc"),
        ("position", (6, 12000), "nchw"),  # sums per channel that fit no block
        ("position rms", (3, 20001), "nchw"),
        ("position pre-norm", (2, 9000, 3), "nchw"),
        ("channel tracked", (2, 3, 20000), "nchw"),
        ("channel tracked", (2, 3, 7001), "nhwc"),
    ],
)
def test_what_fits_no_block(kind: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> None:
    for residual in (None, "pre_act") if "pre-norm" not in kind else (PRE_NORM,):
        options = {"residual": residual, **cases.KINDS[kind]}
        Case(shape=shape, layout=layout, act="relu", dtype=dtype, device=device, limits=SMALL, **options).check()


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("kind", ["channel", "group", "instance", "position"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
def test_large_means(kind: str, layout: str, route: str, mean: float, device: torch.device) -> None:
    """The mean is rounded once to float32, half a unit of 2^-23*mean in deviations of 1; beyond that nothing is lost."""
    case = Case(shape=(4, 6, 16, 8), layout=layout, route=route, mean=mean, device=device, **cases.KINDS[kind])
    errors = case.errors()
    assert errors.pop("rstd") <= 0.1  # deviations from an element are exact: 1e-6
    assert max(errors.values()) <= 1 + mean * 2**-24 / 1e-5, errors


def check_moments(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, expected mean) of every set; float32 holds the mean and rstd no better than they are."""
    _, mean, rstd, _ = case.forward()
    mean, rstd, x = mean.double().flatten(), rstd.double().flatten(), case.x.double()
    sets = x.transpose(0, 1).flatten(1) if case.scope == CHANNEL else x.unflatten(1, (case.groups, -1)).flatten(2).flatten(0, 1)
    want, deviation = sets.mean(1), (sets.var(1, unbiased=False) + 1e-5).sqrt()
    # of the mean the one rounding, and sums of a few hundred deviations; of rstd as much
    assert ((mean - want).abs() <= 6e-8 * want.abs() + 1e-6 * deviation).all()
    assert ((rstd * deviation - 1).abs() <= 2e-6).all(), (rstd * deviation - 1).abs().max()
    return mean, want


def _awkward(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that are hard on sums about a centre that is found on the way; (N, C, H, W) in float64."""
    n, _, h, w = shape
    at = torch.arange(n * h * w, dtype=torch.float64).view(n, 1, h, w).expand(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {
        "the first far away": torch.where(at % w < 1, 0.0, 1000.0 + noise),
        "every thread's first": torch.where((at // 8) % 32 < 16, -300.0, 300.0) + noise,
        "ever larger": at + noise,
        "ever further": torch.where(at % 2 == 0, at, -at),
        "two heaps": torch.where(at < n * h * w // 2, 0.0, 1e4) + noise,
        "far from zero": 1e6 + 100 * noise,
        "one number": torch.full(shape, 1234.5, dtype=torch.float64),
        "one of them apart": torch.where(at == n * h * w - 1, 5.0, 4.0),
    }[kind]


@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("width", [24, 21])  # whole vectors, and rows that begin inside one
@pytest.mark.parametrize(
    "kind",
    [
        *("the first far away", "every thread's first", "ever larger", "ever further", "two heaps", "far from zero"),
        *("one number", "one of them apart"),
    ],
)
def test_moments_of_awkward_numbers(kind: str, width: int, layout: str, route: str, device: torch.device) -> None:
    """Mean and rstd of float32 as exactly as float32 holds them: no digits are lost, wherever a thread begins."""
    for scope, groups in ((CHANNEL, 1), (SAMPLE_GROUP, 2)):
        case = Case(scope, shape=(3, 6, 16, width), groups=groups, layout=layout, route=route, limits=SMALL, device=device)
        case.x.copy_(_awkward(kind, case.shape))
        mean, want = check_moments(case)
        if kind == "one number":
            assert torch.equal(mean, want)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_first_number_far_away(layout: str, device: torch.device) -> None:
    """A thread with hundreds of numbers to sum about it would lose all digits of their variance."""
    case = Case(CHANNEL, shape=(2, 8, 128, 256), layout=layout, limits=SMALL, device=device)
    case.x.copy_(_awkward("far from zero", case.shape) / 100)
    case.x[0, :, 0, 0] = -1e5
    check_moments(case)


@pytest.mark.parametrize("needs", [(True, False, False), (False, False, True), (True, True, False), (False, True, False)])
@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["channel", "channel given", "group", "instance", "position"])
def test_only_what_is_needed(kind: str, layout: str, route: str, needs: tuple[bool, bool, bool], device: torch.device) -> None:
    """A gradient that is not asked for changes nothing in the others."""
    case = Case(shape=(3, 6, 5, 3), layout=layout, route=route, act="leaky_relu", residual="pre_act", device=device, **cases.KINDS[kind])
    out = case.forward()
    full = case.backward(*out)
    part = case.backward(*out, needs=needs)
    dx, dresidual, *parameters = part
    assert (dx is not None) == needs[0]
    assert (dresidual is not None) == needs[1]
    if dx is not None:
        torch.testing.assert_close(dx, full[0], rtol=1e-5, atol=1e-5)
    if dresidual is not None:
        assert torch.equal(dresidual, full[1])
    for got, want in zip(parameters, full[2:], strict=True):
        if needs[2] and want is not None and want.numel():
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time(device: torch.device) -> None:
    for kind in ("channel tracked", "group", "position"):
        for layout in ("nchw", "nhwc"):
            for route in ("single_pass", "two_pass"):
                runs = []
                for _ in range(3):
                    case = Case(shape=(4, 12, 9, 8), layout=layout, route=route, act="silu", device=device, **cases.KINDS[kind])
                    out = case.forward()
                    runs.append([*out[:3], *case.backward(*out)])
                for other in runs[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True) if a is not None)


@pytest.mark.parametrize("route", ["single_pass", "two_pass", "cluster", "group"])
@pytest.mark.parametrize("act", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("groups", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_stays_in_its_set(groups: int | None, act: str, route: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of 7x7 begin inside of vectors, so that the same 16 bytes are read for two channels."""
    scope = {"scope": CHANNEL} if groups is None else {"scope": SAMPLE_GROUP, "groups": groups}
    outs = []
    for bad in (0.0, float("nan")):
        case = Case(shape=(24, 5, 7, 7), dtype=dtype, act=act, residual="pre_act", route=route, device=device, **scope)
        for t in (case.x, case.r, case.dy):
            t[:, 2] = bad
        out = case.forward()
        y, dx, dresidual = (t.float() for t in (out[0], *case.backward(*out)[:2]))
        outs.append([t[:, [0, 1, 3, 4]] for t in (y, dx, dresidual)])
        if bad != bad:
            assert torch.isnan(y[:, 2]).all()
    for clean, beside in zip(*outs, strict=True):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["channel tracked", "group", "position"])
def test_no_elements(kind: str, layout: str, device: torch.device) -> None:
    """As an exported program with a free batch size may be given: a plan is found, nothing is launched, parameters' gradients are zero."""
    for shape in ((0, 6, 4, 4), (2, 6, 0, 4)):
        case = Case(shape=shape, layout=layout, device=device, **cases.KINDS[kind])
        out = case.forward()
        dx, _, *gradients = case.backward(*out)
        assert out[0].shape == dx.shape == case.x.shape
        assert all(float(gradient.abs().sum()) == 0 for gradient in gradients if gradient is not None)
