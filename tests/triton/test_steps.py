"""The four steps for rules written in PyTorch (coefficients per sample and channel), against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from normfused.backends import reference
from normfused.backends import triton as backend
from normfused.backends.triton.plan import Limits, forced
from normfused.problem import SAMPLE_GROUP

from ..support.epilogues import check_epilogue_steps
from .cases import SMALL, TOLERANCE, Case

CASES = [
    ("nchw", torch.float32, "silu", None),
    ("nhwc", torch.float32, "prelu", "pre_act"),
    ("nchw", torch.bfloat16, "relu", "pre_act"),
    ("nhwc", torch.float16, "tlu", "post_act"),
    ("nchw", torch.float64, "mish", "pre_act"),
    ("nhwc", torch.float64, "identity", "pre_act"),
]


@pytest.mark.parametrize(("layout", "dtype", "act", "residual"), CASES)
@pytest.mark.parametrize("limits", [SMALL, None], ids=["small", "default"])
def test_steps(
    layout: str, dtype: torch.dtype, act: str, residual: str | None, limits: Limits | None, device: torch.device
) -> None:  # fmt: skip
    case = Case(SAMPLE_GROUP, shape=(2, 6, 9, 4), groups=6, layout=layout, dtype=dtype, act=act, residual=residual, device=device)
    p, wide = case.p, replace(case.p, dtype=torch.float64)
    scale, shift, dz_scale, q, r = (torch.randn(p.N, p.C, dtype=p.accumulate, device=device) for _ in range(5))
    x, dy = case.x.double(), case.dy.double()
    residual_wide = None if case.r is None else case.r.double()
    aw = None if case.aw is None else case.aw.double()

    def close(got: torch.Tensor | None, want: torch.Tensor | None, tolerance: float) -> None:
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.shape == want.shape
            assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())

    exact = TOLERANCE[p.accumulate]
    with forced(limits=limits):
        mean, var = backend.moments(p, case.x)
        for got, want in zip((mean, var), reference.moments(wide, x), strict=True):
            close(got, want, exact)
        y, _ = backend.apply(p, case.x, case.r, scale, shift, case.aw)
        y_wide, _ = reference.apply(wide, x, residual_wide, scale.double(), shift.double(), aw)
        close(y, y_wide, TOLERANCE[dtype])
        source = {None: None, "y": y, "residual": case.r}[p.z_source]
        source_wide = {None: None, "y": y.double(), "residual": residual_wide}[wide.z_source]
        coefficients = (mean, scale, shift)
        coefficients_wide = tuple(t.double() for t in coefficients)
        sums = backend.grad_moments(p, case.dy, case.x, source, *coefficients, case.aw)
        for got, want in zip(sums, reference.grad_moments(wide, dy, x, source_wide, *coefficients_wide, aw), strict=True):
            close(got, want, 10 * exact)
        rule = (dz_scale, q, r)
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            got = backend.grad_apply(p, case.dy, case.x, source, *coefficients, case.aw, *rule, needs)
            want = reference.grad_apply(wide, dy, x, source_wide, *coefficients_wide, aw, *(t.double() for t in rule), needs)
            assert (got[0] is not None) == needs[0]
            close(got[0], want[0] if needs[0] else None, TOLERANCE[dtype])
            if residual and needs[1]:
                close(got[1], want[1], TOLERANCE[dtype])
            else:
                assert got[1] is None


@pytest.mark.parametrize(
    ("layout", "dtype", "act", "residual"),
    [
        ("nchw", torch.float32, "relu", "pre_act"),
        ("nhwc", torch.bfloat16, "leaky_relu", "pre_act"),
        ("nchw", torch.float16, "silu", "pre_act"),
        ("nhwc", torch.float64, "identity", "pre_act"),
        ("nchw", torch.bfloat16, "prelu", "pre_act"),
        ("nhwc", torch.float16, "tlu", None),
    ],
)
def test_epilogues(layout: str, dtype: torch.dtype, act: str, residual: str | None, device: torch.device) -> None:
    """A factor of the residual, a second output, and its gradient."""
    case = Case(SAMPLE_GROUP, shape=(2, 6, 9, 4), groups=6, layout=layout, dtype=dtype, act=act, residual=residual, device=device)
    with forced(limits=SMALL):
        check_epilogue_steps(backend, case, keeps_y=True)
