"""Mean-only batch norm of half types, a few samples at a time: what is computed in float32 stays in the cache of a core.

Whole float32 copies of x and dy, passed on from operation to operation, would make it half as fast as half types that are rounded after
every operation. Only dz is kept in float32, between the two passes of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ...activations import grad_activate_from_y
from ...problem import POST_ACT, PRE_ACT, Problem, empty_like
from ..reference.moments import update_running_statistics
from ..reference.rules import mean_only as rule
from .activation import activate_, grad_activate_

Needs = tuple[bool, bool, bool]

_ELEMENTS = 65536  # of a part: 256 KB of float32 (2 cores; four times as many are as fast)


def _parts(p: Problem, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    samples = max(1, _ELEMENTS // (p.C * p.S)) if p.device.type == "cpu" else p.N
    return zip(*(repeat(None) if t is None else t.split(samples) for t in tensors), strict=False)


def _over_batch(p: Problem, t: Tensor, x: Tensor) -> Tensor:
    """(C,) against x."""
    return t.to(p.accumulate).view(1, p.C, *[1] * (x.dim() - 2))


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


class _Affine:
    """z = weight*(x - mean) + bias [+ residual] of a part, in new memory."""

    def __init__(self, p: Problem, x: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.mode = p.residual_mode
        self.mean = _over_batch(p, mean, x)
        self.weight = None if weight is None else _over_batch(p, weight, x)
        self.bias = None if bias is None else _over_batch(p, bias, x)
        self.shift = -self.mean if self.bias is None else self.bias - self.mean

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.weight is None:
            z = x + self.shift
        else:
            z = (x - self.mean).mul_(self.weight)
            if self.bias is not None:
                z += self.bias
        if self.mode == PRE_ACT and residual is not None:
            z += residual
        return z


def forward(
    p: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    *tracked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, 1), the latter two (C,); ``tracked``: running mean, None, counter."""
    across = [d for d in range(x.dim()) if d != 1]
    total = None
    for (part,) in _parts(p, x):
        total = _added(total, part.to(p.accumulate).sum(across))
    assert total is not None
    mean = total / p.count
    one = torch.ones_like(mean)
    update_running_statistics(p, rule.tracked_mean(p, mean, weight), one, *tracked)
    affine, y = _Affine(p, x, mean, weight, bias), empty_like(x)
    for part, r, out in _parts(p, x, residual, y):
        activated = activate_(affine(part, r), p.act, act_weight)
        out.copy_(activated.add_(r) if p.residual_mode == POST_ACT else activated)
    return y, mean, one


def backward(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    mean: Tensor, needs: Needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dresidual, dweight, dbias, dact_weight, None); dx = weight*(dz - mean of dz)."""
    across = [d for d in range(x.dim()) if d != 1]
    affine = _Affine(p, x, mean, weight, bias)
    sum_dz = sum_dz_xc = dact_weight = None
    dresidual = empty_like(x) if needs[1] and p.residual_mode == PRE_ACT else None
    kept = []
    for part_dy, part, source, own in _parts(p, dy, x, z_source, dresidual):
        dz, of_weight = part_dy.to(p.accumulate), None
        if p.z_source == "y":
            dz = grad_activate_from_y(dz, source, p.act)
        elif p.act.name != "identity":
            dz, of_weight = grad_activate_(dz, affine(part, source), p.act, act_weight)
        if of_weight is not None and act_weight is not None:
            dact_weight = _added(dact_weight, of_weight.sum(across) if act_weight.numel() > 1 else of_weight.sum())
        sum_dz = _added(sum_dz, dz.sum(across))
        if weight is not None:
            sum_dz_xc = _added(sum_dz_xc, (part - affine.mean).mul_(dz).sum(across))
        if own is not None:
            own.copy_(dz)
        if needs[0]:
            kept.append(dz)
    assert sum_dz is not None
    dx = None
    if needs[0]:
        dx, centre = empty_like(x), _over_batch(p, sum_dz / p.count, x)
        for (out,), dz in zip(_parts(p, dx), kept, strict=True):
            dz -= centre
            out.copy_(dz if affine.weight is None else dz.mul_(affine.weight))
    return (
        dx,
        dresidual,
        None if weight is None or sum_dz_xc is None else sum_dz_xc.to(weight.dtype),
        None if bias is None else sum_dz.to(bias.dtype),
        None if dact_weight is None or act_weight is None else dact_weight.reshape(act_weight.shape).to(act_weight.dtype),
        None,
    )
