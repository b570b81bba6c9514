"""Step 3, forward: z = scale*(x - centre) + shift [+ residual_scale*residual],  y = act(z) [+ residual],  shifted = y + shift_after."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...activations import activate
from ...problem import POST_ACT, PRE_ACT, Problem
from .views import like, ncs


def pre_activation(
    p: Problem,
    x: Tensor,
    residual: Tensor | None,
    centre: Tensor | float,
    scale: Tensor | float,
    shift: Tensor | float,
    residual_scale: Tensor | float = 1.0,
) -> Tensor:
    """z as (N, C, S) in the accumulation type."""
    z = (ncs(p, x).to(p.accumulate) - centre) * scale + shift
    if p.residual_mode == PRE_ACT and residual is not None:
        z = z + residual_scale * ncs(p, residual).to(p.accumulate)
    return z


def activated(
    p: Problem,
    x: Tensor,
    residual: Tensor | None,
    centre: Tensor | float,
    scale: Tensor | float,
    shift: Tensor | float,
    act_weight: Tensor | None,
    residual_scale: Tensor | float = 1.0,
) -> Tensor:
    """y as (N, C, S) in the accumulation type."""
    y = activate(pre_activation(p, x, residual, centre, scale, shift, residual_scale), p.act, act_weight)
    if p.residual_mode == POST_ACT:
        assert residual is not None
        y = y + ncs(p, residual).to(p.accumulate)
    return y


def apply(p: Problem, x: Tensor, *call: Any) -> Tensor:
    return like(p, activated(p, x, *call), x)
