"""y = weight*x*rstd + bias, rstd = 1/sqrt(mean square + eps): the standard rule with "mean := 0" and no r.

A set of one element loses everything to cancellation in 1 - rstd^2 x^2 = eps*rstd^2, so there
dx = weight * rstd^3 * eps * dz  is written out.
A learned eps (FRN) is  eps_eff = eps + |eps_weight|,  with  deps_weight = sign(eps_weight) * sum(-1/2 * rstd^3 * B).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....problem import SAMPLE_GROUP, Problem
from ..views import over_channels, over_set


def effective_eps(p: Problem, eps_weight: Tensor | None) -> Tensor | float:
    """eps, or eps + |eps_weight| shaped like the sets (which are channels of samples)."""
    if eps_weight is None:
        return p.eps
    assert p.scope == SAMPLE_GROUP and p.groups == p.C
    return p.eps + eps_weight.to(p.accumulate).abs().view(1, -1)


def coefficients_vjp(
    p: Problem, rstd: Tensor, b: Tensor, weight: Tensor | None, eps: Tensor | float
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    gamma = over_channels(p, weight, 1.0)
    if p.count == 1:
        return over_set(p, (rstd**3 * eps).expand(p.moments_shape)) * gamma, 0.0, 0.0
    return over_set(p, rstd) * gamma, over_set(p, -(rstd**3) * b / p.count), 0.0


def eps_gradient(rstd: Tensor, b: Tensor, eps_weight: Tensor) -> Tensor:
    per_channel = (-0.5 * rstd**3 * b).sum(0)
    total = per_channel if eps_weight.numel() > 1 else per_channel.sum()
    return (torch.sign(eps_weight.to(rstd.dtype)) * total).to(eps_weight.dtype).reshape(eps_weight.shape)
