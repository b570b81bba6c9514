"""Batch-instance norm by the four steps of a backend: the route ``slices`` of rule batch_instance, where no single pass takes it.

Moments of every (n, c), the rule on numbers of that size in PyTorch (reference/rules/batch_instance.py), apply; x is read twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problem import SAMPLE_GROUP, STANDARD, Problem
from ..rules import pooled
from .reference.moments import unbiased, update_running_statistics
from .reference.rules import batch_instance as rule


def slices(p: Problem) -> Problem:
    """The same call as one whose sets are every (n, c)."""
    return replace(p, scope=SAMPLE_GROUP, groups=p.C, rule=STANDARD, batch_statistics=True)


def statistics(
    p: Problem, mean: Tensor, var: Tensor, running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the backward needs, from the moments of every (n, c); the running statistics move on, or are read."""
    if p.batch_statistics:
        batch_mean, batch_var = (t[0] for t in pooled(mean, var, 0))
        update_running_statistics(p, batch_mean, unbiased(p, batch_var), running_mean, running_var, counter)
    else:
        assert running_mean is not None and running_var is not None
        batch_mean, batch_var = running_mean.to(p.accumulate), running_var.to(p.accumulate)
    return rule.statistics(p, mean, var, batch_mean, batch_var)


def norm_act(
    steps: Any, p: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    gate: Tensor, *buffers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    """``norm_act`` of a backend by its own ``steps``."""
    s = slices(p)
    mean, rstd = statistics(p, *steps.moments(s, x), *buffers)
    centre, scale, shift = rule.coefficients(p, mean, rstd, gate, weight, bias)
    y, _ = steps.apply(s, x, residual, scale, torch.addcmul(shift, scale, centre, value=-1), act_weight)
    return y, mean, rstd, None


def norm_act_backward(
    steps: Any, p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    act_weight: Tensor | None, gate: Tensor, mean: Tensor, rstd: Tensor, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = slices(p)
    centre, scale, shift = rule.coefficients(p, mean, rstd, gate, weight, bias)
    coefficients = centre.contiguous(), scale, torch.addcmul(shift, scale, centre, value=-1)
    sum_dz, sum_dz_xc, dact_weight = steps.grad_moments(s, dy, x, z_source, *coefficients, act_weight)
    q, r, dweight, dbias, dgate = rule.coefficients_vjp(p, mean, rstd, gate, weight, sum_dz, sum_dz_xc)
    dx, dresidual = steps.grad_apply(s, dy, x, z_source, *coefficients, act_weight, scale, q, r, needs)
    return (
        dx,
        dresidual,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dact_weight,
        dgate.to(gate.dtype),
    )
