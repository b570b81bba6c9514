"""The (N, C, S) view of a dense tensor, and set-shaped numbers made to broadcast against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import CHANNEL, NHWC, SAMPLE_GROUP, Problem


def ncs(p: Problem, x: Tensor) -> Tensor:
    """x, dense in ``p.layout``, as (N, C, S); a view."""
    if p.layout == NHWC:
        return x.movedim(1, -1).reshape(p.N, p.S, p.C).transpose(1, 2)
    return x.reshape(p.N, p.C, p.S)


def like(p: Problem, values: Tensor, x: Tensor) -> Tensor:
    """values (N, C, S) as a new tensor with the shape, strides and type of x."""
    out = torch.empty_like(x)
    ncs(p, out).copy_(values)
    return out


def over_set(p: Problem, moments: Tensor) -> Tensor:
    """Numbers of ``p.moments_shape`` as a tensor that broadcasts against (N, C, S)."""
    if p.scope == CHANNEL:
        return moments.view(1, p.C, 1)
    if p.scope == SAMPLE_GROUP:
        return moments.repeat_interleave(p.C // p.groups, dim=1).unsqueeze(2)
    return moments.view(p.N, 1, p.S)


def over_channels(p: Problem, parameter: Tensor | None, default: float) -> Tensor | float:
    """A per-channel parameter in the accumulation type as (1, C, 1), or ``default`` if there is none."""
    return default if parameter is None else parameter.to(p.accumulate).view(1, -1, 1)
