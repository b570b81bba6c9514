"""Step 1, backward: dz = dy*act'(z), then per (n, c) the sums of dz and of dz*(x - centre)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import grad_activate, grad_activate_from_y
from ...problem import Problem
from .apply import pre_activation
from .views import ncs


def activation_gradient(
    p: Problem,
    dy: Tensor,
    x: Tensor,
    z_source: Tensor | None,
    centre: Tensor | float,
    scale: Tensor | float,
    shift: Tensor | float,
    act_weight: Tensor | None,
    residual_scale: Tensor | float = 1.0,
    dshifted: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dz as (N, C, S) in the accumulation type, and the gradient of act_weight in its shape; without ``z_source`` x alone tells z."""
    upstream = ncs(p, dy).to(p.accumulate)
    if dshifted is not None:
        upstream = upstream + ncs(p, dshifted).to(p.accumulate)
    if p.z_source == "y" and z_source is not None:
        return grad_activate_from_y(upstream, ncs(p, z_source).to(p.accumulate), p.act), None
    z = pre_activation(p, x, z_source, centre, scale, shift, residual_scale)
    dz, dweight = grad_activate(upstream, z, p.act, act_weight)
    if dweight is None or act_weight is None:
        return dz, None
    dweight = dweight.sum((0, 2)) if act_weight.numel() > 1 else dweight.sum()
    return dz, dweight.reshape(act_weight.shape).to(act_weight.dtype)


def grad_moments(p: Problem, dz: Tensor, x: Tensor, centre: Tensor | float) -> tuple[Tensor, Tensor]:
    """(sum_dz, sum_dz_xc), each (N, C)."""
    centred = ncs(p, x).to(p.accumulate) - centre
    return dz.sum(2), torch.sum(dz * centred, 2)
