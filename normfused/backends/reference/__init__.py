"""The oracle: the three steps written out in PyTorch, in float64 for float64 and float32 for all else; never chosen by auto."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import BATCH_INSTANCE, MEAN_ONLY, POST_ACT, PRE_ACT, PRE_NORM, RENORM, RMS, Problem
from .. import by_steps
from . import apply as _apply
from . import grad_apply as _grad_apply
from . import grad_moments as _grad_moments
from . import moments as _moments
from .rules import batch_instance, mean_only, renorm, rms, standard
from .views import like, ncs, over_set

Needs = tuple[bool, bool, bool]


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def reads(t: Tensor) -> bool:
    """Any strides will do."""
    return True


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
    h = None
    if p.residual_mode == PRE_NORM:
        assert residual is not None
        x = h = like(p, ncs(p, x) + ncs(p, residual), x)
    tracked = (running_mean, running_var, num_batches_tracked)
    if p.rule == BATCH_INSTANCE:
        assert rule_weight is not None
        mean, saved = by_steps.statistics(p, *_moments.moments(by_steps.slices(p), x), *tracked)
        coefficients = (t.unsqueeze(2) for t in batch_instance.coefficients(p, mean, saved, rule_weight, weight, bias))
        return _apply.apply(p, x, residual, *coefficients, act_weight), mean, saved, None
    if p.batch_statistics:
        mean, var = _moments.moments(p, x)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(p.accumulate, copy=True), running_var.to(p.accumulate)
    saved = rstd = torch.ones_like(var) if p.rule == MEAN_ONLY else standard.rstd(p, var, rms.effective_eps(p, rule_weight))
    if p.rule == RENORM:
        assert running_mean is not None and running_var is not None and bounds is not None
        deviation = (var + p.eps).sqrt()
        r, d = renorm.correction(mean, deviation, running_mean.to(p.accumulate), running_var.to(p.accumulate), *bounds)
        _moments.update_running_statistics(p, mean, deviation, *tracked)
        mean, rstd = renorm.coefficients(mean, rstd, r, d)
        saved = torch.stack([rstd, r, d])
    elif p.batch_statistics:
        value = mean_only.tracked_mean(p, mean, weight) if p.rule == MEAN_ONLY else mean
        _moments.update_running_statistics(p, value, _moments.unbiased(p, var), *tracked)
    centre, scale, shift = standard.coefficients(p, mean, rstd, weight, bias)
    y = _apply.apply(p, x, residual, centre, scale, shift, act_weight)
    # moments of a transposed x come transposed
    return y, (mean.contiguous() if p.centred else mean.new_empty(0)), saved.contiguous(), h


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
    if p.rule == BATCH_INSTANCE:
        assert rule_weight is not None
        return _batch_instance_backward(p, dy, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd)
    saved, rstd = rstd, rstd[0] if p.rule == RENORM else rstd
    centre, scale, shift = standard.coefficients(p, mean, rstd, weight, bias)
    dz, dact_weight = _grad_moments.activation_gradient(p, dy, x, z_source, centre, scale, shift, act_weight)
    sum_dz, sum_dz_xc = _grad_moments.grad_moments(p, dz, x, centre)
    xc = ncs(p, x).to(p.accumulate) - centre
    a, b = standard.weighted_sums(p, dz, xc, sum_dz, sum_dz_xc, weight)
    drule_weight = None
    dz_scale: Tensor | float
    if p.rule == RMS:
        dz_scale, q, r = rms.coefficients_vjp(p, rstd, b, weight, rms.effective_eps(p, rule_weight))
        if rule_weight is not None:
            drule_weight = rms.eps_gradient(rstd, b, rule_weight)
    elif p.rule == RENORM:
        dz_scale, q, r = renorm.coefficients_vjp(p, saved, a, b, weight)
    elif p.rule == MEAN_ONLY:
        dz_scale, q, r = mean_only.coefficients_vjp(p, a, weight)
    else:
        dz_scale, q, r = standard.coefficients_vjp(p, rstd, a, b, weight)
    dx = _grad_apply.grad_apply(p, dz, x, centre, dz_scale, q, r, dh)
    dweight, dbias = standard.parameter_gradients(p, dz, xc, sum_dz, sum_dz_xc, rstd)
    return (
        dx,
        _residual_gradient(p, dy, dz, x),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dact_weight,
        drule_weight,
    )


def _batch_instance_backward(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    gate: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    centre, scale, shift = (t.unsqueeze(2) for t in batch_instance.coefficients(p, mean, rstd, gate, weight, bias))
    dz, dact_weight = _grad_moments.activation_gradient(p, dy, x, z_source, centre, scale, shift, act_weight)
    sums = _grad_moments.grad_moments(p, dz, x, centre)
    q, r, dweight, dbias, dgate = batch_instance.coefficients_vjp(p, mean, rstd, gate, weight, *sums)
    return (
        _grad_apply.grad_apply(p, dz, x, centre, scale, q.unsqueeze(2), r.unsqueeze(2)),
        _residual_gradient(p, dy, dz, x),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dact_weight,
        dgate.to(gate.dtype),
    )


def _residual_gradient(p: Problem, dy: Tensor, dz: Tensor, x: Tensor) -> Tensor | None:
    if p.residual_mode == PRE_ACT:
        return like(p, dz, x)
    return dy if p.residual_mode == POST_ACT else None


# ------------------------------------------------------------------------------ the steps, one set per (n, c)
def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    return _moments.moments(p, x)


def apply(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    factor = 1.0 if residual_scale is None else residual_scale
    y = _apply.activated(p, x, residual, 0.0, over_set(p, scale), over_set(p, shift), act_weight, factor)
    return like(p, y, x) if need_y else None, None if shift_after is None else like(p, y + over_set(p, shift_after), x)


def grad_moments(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, dshifted: Tensor | None = None, against: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    factor = 1.0 if residual_scale is None else residual_scale
    dz, dact_weight = _grad_moments.activation_gradient(
        p, dy, x, z_source, 0.0, over_set(p, scale), over_set(p, shift), act_weight, factor, dshifted
    )
    if against is not None:
        return (*_grad_moments.grad_moments(p, dz, against, 0.0), dact_weight)
    return (*_grad_moments.grad_moments(p, dz, x, over_set(p, mean)), dact_weight)


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
    factor = 1.0 if residual_scale is None else residual_scale
    dz, _ = _grad_moments.activation_gradient(p, dy, x, z_source, 0.0, over_set(p, scale), over_set(p, shift), act_weight, factor, dshifted)
    dx = _grad_apply.grad_apply(p, dz, x, over_set(p, mean), over_set(p, dz_scale), over_set(p, q), over_set(p, r))
    return dx, _residual_gradient(p, dy, factor * dz, x)
