"""Step 1, forward: x -> mean and biased variance of every set (of the rms rule: zero and the mean square)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import CHANNEL, SAMPLE_GROUP, Problem
from .views import ncs, over_set


def set_mean(p: Problem, values: Tensor) -> Tensor:
    """Mean of (N, C, S) values over every set, in ``p.moments_shape``."""
    if p.scope == CHANNEL:
        return values.mean((0, 2))
    if p.scope == SAMPLE_GROUP:
        return values.reshape(p.N, p.groups, -1).mean(2)
    return values.mean(1)


def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    values = ncs(p, x).to(p.accumulate)
    if not p.centred:
        return values.new_zeros(p.moments_shape), set_mean(p, values * values)
    # x - K with K one element of the set, so that the mean of a constant set is exact and no large numbers are summed
    first = values[:1, :, :1].reshape(p.C) if p.scope == CHANNEL else None
    if first is None:
        first = values[:, :: p.C // p.groups, 0] if p.scope == SAMPLE_GROUP else values[:, 0, :]
    shifted = values - over_set(p, first)
    offset = set_mean(p, shifted)
    centred = shifted - over_set(p, offset)
    return first + offset, set_mean(p, centred * centred)


def update_running(running: Tensor | None, value: Tensor, factor: float | Tensor) -> None:
    """running <- (1 - factor)*running + factor*value, computed in value's type and rounded once."""
    if running is not None and running.numel():
        new = running.to(value.dtype) * (1 - factor) + value * factor
        running.copy_(new)


def unbiased(p: Problem, var: Tensor) -> Tensor:
    return var * (p.count / (p.count - 1)) if p.count > 1 else var * torch.nan


def update_running_statistics(
    p: Problem, mean: Tensor, spread: Tensor, running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None
) -> None:
    """Running mean and (unbiased) variance or what else tells the spread; the counter goes first, as momentum None reads it."""
    if counter is not None:
        counter.add_(1)
    if running_mean is None and running_var is None:
        return
    factor: float | Tensor
    if p.momentum is None:
        factor = 1.0 if counter is None else counter.to(p.accumulate).reciprocal()
    else:
        factor = p.momentum
    if p.scope == SAMPLE_GROUP:  # instance norm: the average over the samples
        mean, spread = mean.mean(0), spread.mean(0)
    update_running(running_mean, mean, factor)
    update_running(running_var, spread, factor)
