"""y = weight*(x - mean)*rstd + bias.

coefficients: (mean, var) -> centre = mean, scale = weight*rstd, shift = bias
vjp, with A = sum over the set of weight*sum_dz, B = of weight*sum_dz_xc, M elements in the set:

    dz_scale = weight*rstd      q = -rstd^3*B/M      r = -rstd*A/M
    dweight_c = sum_n rstd*sum_dz_xc                 dbias_c = sum_n sum_dz
"""

from __future__ import annotations

from torch import Tensor

from ....problem import CHANNEL, POSITION, SAMPLE_GROUP, Problem
from ..views import over_channels, over_set


def rstd(p: Problem, var: Tensor, eps: Tensor | float) -> Tensor:
    return (var + eps).rsqrt()


def coefficients(
    p: Problem, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """(centre, scale, shift), broadcasting against (N, C, S)."""
    centre = over_set(p, mean) if p.centred else 0.0
    return centre, over_set(p, rstd) * over_channels(p, weight, 1.0), over_channels(p, bias, 0.0)


def set_sum(p: Problem, per_slice: Tensor) -> Tensor:
    """Sum of (N, C) numbers over every set (scopes channel and sample_group)."""
    if p.scope == CHANNEL:
        return per_slice.sum(0)
    return per_slice.reshape(p.N, p.groups, -1).sum(2)


def weighted_sums(p: Problem, dz: Tensor, xc: Tensor, sum_dz: Tensor, sum_dz_xc: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B per set. Where the weight varies along the reduced positions (scope position) it weighs every element."""
    gamma = over_channels(p, weight, 1.0)
    if p.scope == POSITION:
        return (dz * gamma).sum(1), (dz * gamma * xc).sum(1)
    flat = gamma if isinstance(gamma, float) else gamma.view(1, p.C)
    return set_sum(p, sum_dz * flat), set_sum(p, sum_dz_xc * flat)


def parameter_gradients(p: Problem, dz: Tensor, xc: Tensor, sum_dz: Tensor, sum_dz_xc: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dweight, dbias), each (C,) in the accumulation type."""
    if p.scope == POSITION:
        return (dz * xc * over_set(p, rstd)).sum((0, 2)), dz.sum((0, 2))
    per_slice = rstd if p.scope == CHANNEL else over_set(p, rstd).squeeze(2)
    return (sum_dz_xc * per_slice).sum(0), sum_dz.sum(0)


def coefficients_vjp(
    p: Problem, rstd: Tensor, a: Tensor, b: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """(dz_scale, q, r), broadcasting against (N, C, S)."""
    dz_scale = over_set(p, rstd) * over_channels(p, weight, 1.0)
    if not p.batch_statistics:
        return dz_scale, 0.0, 0.0
    return dz_scale, over_set(p, -(rstd**3) * b / p.count), over_set(p, -rstd * a / p.count)


__all__ = ["SAMPLE_GROUP", "coefficients", "coefficients_vjp", "parameter_gradients", "rstd", "weighted_sums"]
