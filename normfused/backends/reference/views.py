"""The (N, C, S) view of a dense tensor, and set-shaped numbers made to broadcast against it."""

from __future__ import annotations

from torch import Tensor

from ...problem import CHANNEL, SAMPLE_GROUP, Problem, empty_like


def ncs(p: Problem, x: Tensor) -> Tensor:
    """x as (N, C, S); a view unless its positions do not lie evenly in memory."""
    return x.reshape(p.N, p.C, p.S)


def like(p: Problem, values: Tensor, x: Tensor) -> Tensor:
    """values (N, C, S) as a new tensor with the shape, memory format and type of x."""
    out = empty_like(x)
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
