"""Batch Renorm: y = weight*((x - mean)*rstd*r + d) + bias, sigma = sqrt(var + eps) = 1/rstd, r and d constants of the backward:

r = clamp(sigma/running deviation, 1/r_max, r_max), d = clamp((mean - running mean)/running deviation, -d_max, d_max), of the running
statistics before this step. With scale = r*rstd that is weight*scale*(x - centre) + bias, centre = mean - d/scale: the standard rule
about another centre (where nothing is clamped: the running mean and deviation). ``rstd`` of the interface is (scale, r, d) here.

vjp, with B' = sum of weight*dz*(x - centre), shift = mean - centre and B = B' - shift*A, which is about the mean:

    dz_scale = weight*scale      q = -scale*rstd^2*B/M      r = -scale*A/M - q*shift
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from ..views import over_channels, over_set


def correction(
    mean: Tensor, deviation: Tensor, running_mean: Tensor, running_deviation: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """(r, d), (C,)."""
    highest, farthest = r_max.to(mean.dtype), d_max.to(mean.dtype)
    r = (deviation / running_deviation).clamp(highest.reciprocal(), highest)
    return r, ((mean - running_mean) / running_deviation).clamp(-farthest, farthest)


def coefficients(mean: Tensor, rstd: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(centre, scale), (C,)."""
    scale = rstd * r
    return mean - d / scale, scale


def coefficients_vjp(p: Problem, saved: Tensor, a: Tensor, b: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dz_scale, q, r), broadcasting against (N, C, S)."""
    scale, r, d = saved
    shift = d / scale
    q = -scale * (scale / r) ** 2 * (b - shift * a) / p.count
    return over_set(p, scale) * over_channels(p, weight, 1.0), over_set(p, q), over_set(p, -scale * a / p.count - q * shift)
