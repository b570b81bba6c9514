"""What CPU tensors get, and CUDA tensors where no kernel of ours can run: ATen's kernels, composed.

`composite` is a whole norm as differentiable operations; `steps` are moments -> apply and grad_moments -> grad_apply, for the
norms that ATen has no accurate kernel for (FRN, channels_last group and instance norm) and for rules written in PyTorch; `mean_only` is
that norm of half types.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import MEAN_ONLY, POST_ACT, PRE_ACT, RMS, SAMPLE_GROUP, Problem
from .. import reference
from ..reference.moments import unbiased, update_running_statistics
from ..reference.rules import rms
from . import mean_only, steps

Needs = tuple[bool, bool, bool]


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def reads(t: Tensor) -> bool:
    """Its steps take dense tensors; what comes otherwise is copied once. (Its composite takes any strides.)"""
    return False


def _per_channel(p: Problem, per_group: Tensor) -> Tensor:
    return per_group.repeat_interleave(p.C // p.groups, dim=1) if p.groups != p.C else per_group


def _set_sum(p: Problem, per_slice: Tensor) -> Tensor:
    return per_slice.view(p.N, p.groups, -1).sum(2) if p.groups != p.C else per_slice


def _coefficients(
    p: Problem, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scale, shift, centre), (N, C); centre is None for the rms rule."""
    scale = _per_channel(p, rstd)
    if weight is not None:
        scale = scale * weight
    if not p.centred:
        return scale, (torch.zeros_like(scale) if bias is None else bias.to(scale.dtype).expand_as(scale).contiguous()), None
    centre = _per_channel(p, mean)
    shift = -centre * scale if bias is None else torch.addcmul(bias.to(scale.dtype), centre, scale, value=-1)
    return scale, shift, centre


def norm_act(
    p: Problem,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    buffers = (running_mean, running_var, num_batches_tracked)
    if p.rule == MEAN_ONLY and p.batch_statistics and p.dtype != p.accumulate:
        return *mean_only.forward(p, x, residual, weight, bias, act_weight, *buffers), None
    if p.scope != SAMPLE_GROUP or p.dtype != p.accumulate:  # those go through the composite (ops.path); kept for direct operator calls
        return reference.norm_act(p, x, residual, weight, bias, act_weight, rule_weight, *buffers, bounds)
    if p.rule == RMS:
        mean, rstd = x.new_empty(0), (steps.mean_square(p, x) + rms.effective_eps(p, rule_weight)).rsqrt()
    else:
        mean, var = steps.moments(p, x)
        if p.groups != p.C:
            slice_mean = mean
            mean = slice_mean.view(p.N, p.groups, -1).mean(2)
            spread = (slice_mean - _per_channel(p, mean)).square_()
            var = (var + spread).view(p.N, p.groups, -1).mean(2)
        update_running_statistics(p, mean, unbiased(p, var), running_mean, running_var, num_batches_tracked)
        rstd = (var + p.eps).rsqrt()
    scale, shift, _ = _coefficients(p, mean, rstd, weight, bias)
    return steps.apply(p, x, residual, scale, shift, act_weight), mean, rstd, None


def norm_act_backward(
    p: Problem,
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    z_source: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    if p.rule == MEAN_ONLY and p.batch_statistics and p.dtype != p.accumulate:
        return mean_only.backward(p, dy, x, z_source, weight, bias, act_weight, mean, needs)
    if p.scope != SAMPLE_GROUP or p.dtype != p.accumulate:
        return reference.norm_act_backward(p, dy, dh, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, needs)
    scale, shift, centre = _coefficients(p, mean, rstd, weight, bias)
    dz, dact_weight = steps.activation_gradient(p, dy, x, z_source, scale, shift, act_weight)
    sum_dz, sum_dz_xc = steps.grad_moments(p, dz, x, torch.zeros_like(scale) if centre is None else centre)
    b = _set_sum(p, sum_dz_xc if weight is None else sum_dz_xc * weight)
    drule_weight = None
    if p.rule == RMS:
        r = None
        if rule_weight is not None:
            drule_weight = rms.eps_gradient(rstd, b, rule_weight)
        if p.count == 1:
            one = rstd**3 * rms.effective_eps(p, rule_weight)
            dz_scale, q = (one if weight is None else one * weight), None
        else:
            dz_scale, q = scale, -(rstd**3) * b / p.count
    else:
        a = _set_sum(p, sum_dz if weight is None else sum_dz * weight)
        dz_scale, q, r = scale, _per_channel(p, -(rstd**3) * b / p.count), _per_channel(p, -rstd * a / p.count)
    dx = steps.grad_apply(p, dz, x, centre, dz_scale, q, r) if needs[0] else None
    return (
        dx,
        dz if needs[1] and p.residual_mode == PRE_ACT else None,
        None if weight is None else (sum_dz_xc * _per_channel(p, rstd)).sum(0).to(weight.dtype),
        None if bias is None else sum_dz.sum(0).to(bias.dtype),
        dact_weight,
        drule_weight,
    )


# ------------------------------------------------------------------------------ the steps, one set per (n, c)
def _wide(p: Problem, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(p.accumulate) for t in tensors]


def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    return steps.moments(p, x.to(p.accumulate))


def apply(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    wide_x, wide_residual = _wide(p, x, residual)
    assert wide_x is not None
    y = steps.apply(p, wide_x, wide_residual, scale, shift, act_weight, residual_scale)
    shifted = None if shift_after is None else torch.add(y, steps.over_positions(p, shift_after, x), out=torch.empty_like(y)).to(p.dtype)
    return y.to(p.dtype) if need_y else None, shifted


def _joined(p: Problem, dy: Tensor, dshifted: Tensor | None) -> Tensor:
    """dy in the accumulation type, with the gradient of the other output."""
    dy = dy.to(p.accumulate)
    return dy if dshifted is None else dy + dshifted


def activation_gradient(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dz in the accumulation type, gradient of act_weight): once for both steps of the backward."""
    dy, x, z_source = _wide(p, dy, x, z_source)  # type: ignore[assignment]
    return steps.activation_gradient(p, dy, x, z_source, scale, shift, act_weight)


def grad_moments(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, dshifted: Tensor | None = None, against: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    x, z_source, against = _wide(p, x, z_source, against)  # type: ignore[assignment]
    dz, dact_weight = steps.activation_gradient(p, _joined(p, dy, dshifted), x, z_source, scale, shift, act_weight, residual_scale)
    if against is not None:
        x, mean = against, torch.zeros_like(mean)
    return (*steps.grad_moments(p, dz, x, mean), dact_weight)


def grad_apply(
    p: Problem,
    dy: Tensor,
    x: Tensor,
    z_source: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    act_weight: Tensor | None,
    dz_scale: Tensor,
    q: Tensor,
    r: Tensor,
    needs: Needs,
    residual_scale: Tensor | None = None,
    dshifted: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    x, z_source = _wide(p, x, z_source)  # type: ignore[assignment]
    dz, _ = steps.activation_gradient(p, _joined(p, dy, dshifted), x, z_source, scale, shift, act_weight, residual_scale)
    dx = steps.grad_apply(p, dz, x, mean, dz_scale, q, r) if needs[0] else None
    own = p.act.name != "identity" or residual_scale is not None or dshifted is not None
    dresidual = (dz if residual_scale is None else dz * residual_scale) if needs[1] and p.residual_mode == PRE_ACT and own else None
    return None if dx is None else dx.to(p.dtype), None if dresidual is None else dresidual.to(p.dtype)


__all__ = [
    "POST_ACT",
    "activation_gradient",
    "apply",
    "grad_apply",
    "grad_moments",
    "moments",
    "norm_act",
    "norm_act_backward",
    "reads",
    "unavailable",
]
