"""Step 3, forward: z = scale*(x - centre) + shift [+ residual],  y = act(z) [+ residual]."""

from __future__ import annotations

from torch import Tensor

from ...activations import activate
from ...problem import POST_ACT, PRE_ACT, Problem
from .views import like, ncs


def pre_activation(
    p: Problem, x: Tensor, residual: Tensor | None, centre: Tensor | float, scale: Tensor | float, shift: Tensor | float
) -> Tensor:
    """z as (N, C, S) in the accumulation type."""
    z = (ncs(p, x).to(p.accumulate) - centre) * scale + shift
    if p.residual_mode == PRE_ACT and residual is not None:
        z = z + ncs(p, residual).to(p.accumulate)
    return z


def apply(
    p: Problem,
    x: Tensor,
    residual: Tensor | None,
    centre: Tensor | float,
    scale: Tensor | float,
    shift: Tensor | float,
    act_weight: Tensor | None,
) -> Tensor:
    y = activate(pre_activation(p, x, residual, centre, scale, shift), p.act, act_weight)
    if p.residual_mode == POST_ACT:
        assert residual is not None
        y = y + ncs(p, residual).to(p.accumulate)
    return like(p, y, x)
