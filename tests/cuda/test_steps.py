"""The four steps for rules written in PyTorch (coefficients per sample and channel), against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from normfused.backends import cuda as backend
from normfused.backends import reference
from normfused.problem import SAMPLE_GROUP

from ..support.cases import TOLERANCE
from ..support.epilogues import check_epilogue_steps
from .cases import SMALL, Case, forced

CASES: list[tuple[str, torch.dtype, str, str | None]] = [
    ("nchw", torch.float32, "silu", None),
    ("nhwc", torch.float32, "prelu", "pre_act"),
    ("nchw", torch.float32, "prelu", "post_act"),
    ("nchw", torch.bfloat16, "relu", "pre_act"),
    ("nhwc", torch.bfloat16, "relu", None),
    ("nhwc", torch.float16, "tlu", "post_act"),
    ("nchw", torch.float16, "tlu", "pre_act"),
    ("nchw", torch.float64, "mish", "pre_act"),
    ("nhwc", torch.float64, "identity", "pre_act"),
    ("nchw", torch.float64, "identity", None),
]
# whole vectors, tails, rows that start inside a vector, one row, and enough rows or columns for several chunks
SHAPES = [(2, 6, 9, 4), (3, 5, 7), (2, 16, 8, 8), (2, 3, 2, 3, 5), (1, 2, 96, 91), (2, 40, 1, 1)]


def check_steps(case: Case, limits: tuple[int, int, int, int] | None) -> None:
    p, wide = case.p, replace(case.p, dtype=torch.float64)
    make = torch.Generator().manual_seed(case.seed)
    scale, shift, dz_scale, q, r = (torch.randn(p.N, p.C, dtype=p.accumulate, generator=make).to(case.device) for _ in range(5))
    x, dy = case.x.double(), case.dy.double()
    residual_wide = None if case.r is None else case.r.double()
    aw = None if case.aw is None else case.aw.double()

    def close(got: Tensor | None, want: Tensor | None, tolerance: float, least: float = 0.0) -> None:
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.shape == want.shape
            assert float((got.double() - want).abs().max()) <= tolerance * max(float(want.abs().max()), least)

    exact = TOLERANCE[p.accumulate]
    with forced(None, limits):
        mean, var = backend.moments(p, case.x)
        for got, want in zip((mean, var), reference.moments(wide, x), strict=True):
            close(got, want, exact, least=1.0)  # one element has no variance
        y, _ = backend.apply(p, case.x, case.r, scale, shift, case.aw)
        y_wide, _ = reference.apply(wide, x, residual_wide, scale.double(), shift.double(), aw)
        close(y, y_wide, TOLERANCE[p.dtype])
        source = case.r if case.residual == "pre_act" and p.act.name != "identity" else None
        source_wide = {None: None, "y": y_wide, "residual": residual_wide}[wide.z_source]
        coefficients = (mean, scale, shift)
        coefficients_wide = tuple(t.double() for t in coefficients)
        sums = backend.grad_moments(p, case.dy, case.x, source, *coefficients, case.aw)
        for got, want in zip(sums, reference.grad_moments(wide, dy, x, source_wide, *coefficients_wide, aw), strict=True):
            close(got, want, 10 * exact, least=1.0)
        rule: tuple[Any, ...] = (dz_scale, q, r)
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            got = backend.grad_apply(p, case.dy, case.x, source, *coefficients, case.aw, *rule, needs)
            want = reference.grad_apply(wide, dy, x, source_wide, *coefficients_wide, aw, *(t.double() for t in rule), needs)
            assert (got[0] is not None) == needs[0]
            close(got[0], want[0] if needs[0] else None, TOLERANCE[p.dtype])
            if case.residual and needs[1]:
                close(got[1], want[1], TOLERANCE[p.dtype])
            else:
                assert got[1] is None


@pytest.mark.parametrize("limits", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("layout", "dtype", "act", "residual"), CASES)
def test_steps(
    layout: str, dtype: torch.dtype, act: str, residual: str | None, shape: tuple[int, ...], limits: Any, device: torch.device
) -> None:
    check_steps(
        Case(SAMPLE_GROUP, shape=shape, groups=shape[1], layout=layout, dtype=dtype, act=act, residual=residual, device=device), limits
    )


# pairs: every type in both layouts, every kind of instantiation, with and without a residual
EPILOGUES: list[tuple[str, torch.dtype, str, str | None]] = [
    ("nchw", torch.float32, "relu", "pre_act"),
    ("nhwc", torch.float32, "silu", "pre_act"),
    ("nchw", torch.bfloat16, "identity", "pre_act"),
    ("nhwc", torch.bfloat16, "leaky_relu", "pre_act"),
    ("nchw", torch.float16, "silu", "pre_act"),
    ("nhwc", torch.float16, "prelu", "pre_act"),
    ("nchw", torch.bfloat16, "tlu", "pre_act"),
    ("nchw", torch.float64, "mish", "pre_act"),
    ("nhwc", torch.float64, "relu", None),
    ("nhwc", torch.bfloat16, "relu", None),
    ("nchw", torch.float16, "gelu", None),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("layout", "dtype", "act", "residual"), EPILOGUES)
def test_epilogues(layout: str, dtype: torch.dtype, act: str, residual: str | None, shape: tuple[int, ...], device: torch.device) -> None:
    """A factor of the residual, a second output, and its gradient."""
    case = Case(SAMPLE_GROUP, shape=shape, groups=shape[1], layout=layout, dtype=dtype, act=act, residual=residual, device=device)
    with forced(None, SMALL):
        check_epilogue_steps(backend, case, keeps_y=False)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean_and_shared_weight(layout: str, device: torch.device) -> None:
    """A weight that all channels share, and a large mean that takes no digits from the variance."""
    case = Case(SAMPLE_GROUP, shape=(2, 6, 33, 31), groups=6, layout=layout, act="prelu", shared_act_weight=True, mean=100.0, device=device)
    with forced(None, SMALL):
        mean, var = backend.moments(case.p, case.x)
    wide = reference.moments(replace(case.p, dtype=torch.float64), case.x.double())
    torch.testing.assert_close(mean.double(), wide[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide[1], rtol=1e-5, atol=0)
    check_steps(Case(SAMPLE_GROUP, shape=(2, 6, 9, 4), groups=6, layout=layout, act="prelu", shared_act_weight=True, device=device), SMALL)
