"""y = weight*(x - mean) + bias: the standard rule with rstd := 1, whose derivative has no term of the variance.

vjp: dz_scale = weight    q = 0    r = -A/M. The running mean is that of weight*x, before the subtraction.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from ..views import over_channels, over_set


def tracked_mean(p: Problem, mean: Tensor, weight: Tensor | None) -> Tensor:
    return mean if weight is None else mean * weight.to(p.accumulate)


def coefficients_vjp(p: Problem, a: Tensor, weight: Tensor | None) -> tuple[Tensor | float, float, Tensor | float]:
    """(dz_scale, q, r), broadcasting against (N, C, S)."""
    return over_channels(p, weight, 1.0), 0.0, over_set(p, -a / p.count)
