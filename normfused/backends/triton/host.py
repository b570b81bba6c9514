"""The host side of the backend: which kernels a step launches, with what; no arithmetic on tensors of the size of x."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...problem import BATCH_INSTANCE, CHANNEL, MEAN_ONLY, POSITION, POST_ACT, PRE_ACT, PRE_NORM, SAMPLE_GROUP, Problem
from .. import by_steps
from .apply import apply_kernel
from .coefficients import average_running_kernel, finalize_kernel
from .grad_apply import grad_apply_kernel
from .grad_coefficients import grad_channels_kernel, grad_sets_kernel
from .grad_moments import grad_moments_kernel
from .grad_positions import grad_positions_kernel
from .grad_single_pass import grad_single_pass_kernel
from .launch import launch, on_device_of
from .moments import moments_kernel
from .plan import SINGLE_PASS, Geometry, Plan, RowTile, SetTile, Stream, cdiv, mask_bytes, mask_group, plan_for, power_of_2
from .positions import positions_kernel
from .single_pass import single_pass_kernel

Needs = tuple[bool, bool, bool]
Bounds = tuple[Tensor | None, Tensor | None]  # r_max and d_max of the renorm rule
_LANES = 1024  # accumulators of the kernels that merge partials


# ------------------------------------------------------------------------------------------------- what kernels are given
def _type(p: Problem) -> dict[str, Any]:
    return {"ACC": tl.float64 if p.accumulate == torch.float64 else tl.float32}


def _activation(p: Problem, act_weight: Tensor | None) -> dict[str, Any]:
    per_channel = act_weight is not None and act_weight.numel() > 1
    return {"ACT": p.act.name, "P0": p.act.p0, "P1": p.act.p1, "ACT_PER_CHANNEL": per_channel}


def _layout(g: Geometry) -> dict[str, Any]:
    return {"NHWC": g.nhwc, "ALIGN": _align(g)}


def _align(g: Geometry) -> int:
    return 1 if g.vector == 16 else g.vector  # Triton finds out about 16 by itself


def _tiles(g: Geometry, t: Stream) -> dict[str, Any]:
    return {**_layout(g), "WIDE": t.wide, "BC": t.BC, "BS": t.BS, "TILES": t.TILES, "num_warps": t.num_warps}


def _where(g: Geometry, t: Stream) -> tuple[int, ...]:
    return g.S, t.s_tiles, t.tiles, t.chunks


def _sets(g: Geometry, t: SetTile) -> dict[str, Any]:
    return {"ALIGN": 1 if g.nhwc else _align(g), "WIDE": t.wide, "BSET": t.BSET, "BR": t.BR, "BS": t.BS, "num_warps": t.num_warps}


def _set_strides(g: Geometry, t: SetTile) -> tuple[int, ...]:
    return t.S, t.R, t.outer_stride, t.set_stride, t.row_stride, g.sS, g.C // g.D, t.per_outer


def _rows(g: Geometry, t: RowTile) -> dict[str, Any]:
    return {**_layout(g), "WIDE": t.wide, "BP": t.BP, "BC": t.BC, "BLOCKS_C": t.BLOCKS_C, "num_warps": t.num_warps}


def _merge(names: tuple[str, str], kept: int, summed: int) -> tuple[int, dict[str, int]]:
    """Programs and block sizes of a kernel that keeps ``kept`` numbers and sums over ``summed`` partials of each."""
    BP = min(power_of_2(summed), _LANES // 16)
    BK = min(power_of_2(kept), _LANES // BP)
    return cdiv(kept, BK), {names[0]: BK, names[1]: BP, "LOOPS": power_of_2(cdiv(summed, BP)), "num_warps": 4}


def _source(p: Problem, source: Tensor | None, slices: bool = False) -> dict[str, Any]:
    """What the backward knows z from, and how many elements a byte of the mask holds."""
    group = 0 if slices else mask_group(p)  # the steps leave no mask
    return {"SOURCE": "mask" if group else "x" if source is None else p.z_source, "GROUP": group or 1}


def _like(p: Problem, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=p.accumulate, device=x.device)


def _averages(p: Problem, counter: Tensor | None) -> bool:
    """Whether momentum is None. The kernels read the counter then, so it is counted before they run; else one of them counts."""
    if p.momentum is None and counter is not None:
        counter.add_(1)
    return p.momentum is None and counter is not None


def _momentum(p: Problem) -> float:
    return 1.0 if p.momentum is None else float(p.momentum)


# ------------------------------------------------------------------------------------------------------------ forward
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
    bounds: Bounds = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    plan = plan_for(p)
    if p.rule == BATCH_INSTANCE and plan.route != SINGLE_PASS:
        assert rule_weight is not None
        buffers = (running_mean, running_var, num_batches_tracked)
        return by_steps.norm_act(_steps(), p, x, residual, weight, bias, act_weight, rule_weight, *buffers)
    y = torch.empty_like(x)
    rstd = _like(p, x, p.rstd_shape)
    mean = _like(p, x, p.moments_shape if p.centred or not p.batch_statistics else (0,))
    residual = residual if p.residual_mode is not None else None
    mask = torch.empty(mask_bytes(p), dtype=torch.uint8, device=x.device) if mask_group(p) else None
    with on_device_of(x):
        if p.scope == POSITION:
            h = torch.empty_like(x) if p.residual_mode == PRE_NORM else None
            _positions(p, plan, x, residual, h, y, mean if p.centred else None, rstd, weight, bias, act_weight)
            return y, mean, rstd, h
        if not p.batch_statistics and plan.route != SINGLE_PASS:
            given = running_mean, running_var
            _apply(p, plan, x, residual, y, mask, mean, rstd, weight, bias, act_weight, given=given)
            return y, mean if p.centred else mean.new_empty(0), rstd, mask
        counter = num_batches_tracked if p.batch_statistics else None
        tracked = (_some(running_mean), _some(running_var), counter)
        average = _averages(p, counter)
        over_samples = p.scope == SAMPLE_GROUP and any(b is not None for b in tracked)
        var = _like(p, x, p.moments_shape) if over_samples else None
        out = (mean if p.centred or over_samples else None, var, rstd, rule_weight)
        in_kernel = (None, None, None) if over_samples else tracked
        if plan.route == SINGLE_PASS:
            _single_pass(p, plan, x, residual, y, mask, out, weight, bias, act_weight, in_kernel, average, bounds)
        else:
            _moments(p, plan, x, out, in_kernel, average, weight, bounds)
            _apply(p, plan, x, residual, y, mask, mean if p.centred else None, rstd, weight, bias, act_weight)
        if over_samples:
            programs, blocks = _merge(("BC", "BN"), p.C, p.N)
            constants = {"AVERAGE": average, **_type(p), **blocks}
            launch(average_running_kernel, programs, mean, var, *tracked, _momentum(p), p.N, p.C, p.count, **constants)
    return y, mean, rstd, mask


def _some(buffer: Tensor | None) -> Tensor | None:
    return buffer if buffer is not None and buffer.numel() else None


def _moments(
    p: Problem,
    plan: Plan,
    x: Tensor,
    out: tuple[Tensor | None, ...],
    tracked: tuple[Tensor | None, ...],
    average: bool,
    weight: Tensor | None = None,
    bounds: Bounds = (None, None),
) -> None:
    """``out``: mean, var, rstd to be written (or None) and rule_weight; ``tracked``: running mean and variance, the counter."""
    g, t = plan.geometry, plan.stream
    part_m2 = _like(p, x, (t.chunks, g.outer, g.C))
    part_mean = torch.empty_like(part_m2) if p.centred else None
    shape = {**_type(p), **_tiles(g, t)}
    launch(moments_kernel, t.programs, x, part_mean, part_m2, g.outer, g.inner, g.C, *_where(g, t), CENTRED=p.centred, **shape)
    programs, blocks = _merge(("BSET", "BP"), g.sets, t.chunks * g.D)
    *moments, rule_weight = out
    weight = weight if p.rule == MEAN_ONLY else None
    launch(
        finalize_kernel, programs, part_mean, part_m2, *moments, weight, rule_weight, *tracked, *bounds, _momentum(p),
        g.outer, g.C, g.D, g.S, t.s_tiles, t.tiles, t.chunks, g.sets, p.count,
        RULE=p.rule, EPS=p.eps, EPS_PER_CHANNEL=rule_weight is not None and rule_weight.numel() > 1, AVERAGE=average,
        BS=t.BS, TILES=t.TILES, **_type(p), **blocks,
    )  # fmt: skip


def _apply(
    p: Problem,
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    act_weight: Tensor | None,
    slices: bool = False,
    given: tuple[Tensor | None, Tensor | None] = (None, None),
    residual_scale: Tensor | None = None,
    shift_after: Tensor | None = None,
    shifted: Tensor | None = None,
) -> None:
    g, t = plan.geometry, plan.stream
    launch(
        apply_kernel, t.programs, x, residual, y, mask, mean, scale, weight, shift, act_weight, *given,
        residual_scale, shift_after, shifted,
        g.inner, g.C, g.D, *_where(g, t),
        SLICES=slices, POST=p.residual_mode == POST_ACT, EPS=p.eps, GROUP=mask_group(p) or 1,
        **_activation(p, act_weight), **_type(p), **_tiles(g, t),
    )  # fmt: skip


def _single_pass(
    p: Problem,
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mask: Tensor | None,
    out: tuple[Tensor | None, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    tracked: tuple[Tensor | None, ...],
    average: bool,
    bounds: Bounds,
) -> None:
    g, t = plan.geometry, plan.sets
    assert t is not None
    mean, var, rstd, rule_weight = out
    launch(
        single_pass_kernel, t.programs,
        x, residual, y, mask, mean, var, rstd, weight, bias, act_weight, rule_weight, *tracked, *bounds, _momentum(p),
        g.C, g.D, *_set_strides(g, t), p.count,
        RULE=p.rule, GIVEN=not p.batch_statistics, EPS=p.eps, EPS_PER_CHANNEL=rule_weight is not None and rule_weight.numel() > 1,
        AVERAGE=average, POST=p.residual_mode == POST_ACT, GROUP=mask_group(p) or 1, NHWC=g.nhwc, ROWS_ARE_CHANNELS=p.scope == SAMPLE_GROUP,
        **_activation(p, act_weight), **_type(p), **_sets(g, t),
    )  # fmt: skip


def _positions(
    p: Problem,
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
) -> None:
    g, t = plan.geometry, plan.rows
    assert t is not None
    launch(
        positions_kernel, t.all_blocks, x, residual, h, y, mean, rstd, weight, bias, act_weight,
        g.C, g.S, t.blocks,
        CENTRED=p.centred, EPS=p.eps, PRE_NORM=p.residual_mode == PRE_NORM, PRE_ACT=p.residual_mode == PRE_ACT,
        POST=p.residual_mode == POST_ACT, **_activation(p, act_weight), **_type(p), **_rows(g, t),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- backward
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
    plan = plan_for(p, backward=True)
    if p.rule == BATCH_INSTANCE and plan.route != SINGLE_PASS:
        assert rule_weight is not None
        return by_steps.norm_act_backward(_steps(), p, dy, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, needs)
    need_dx, need_dresidual, need_parameters = needs
    source = z_source if p.z_source is not None else None
    dx = torch.empty_like(x) if need_dx else None
    writes_dresidual = need_dresidual and p.residual_mode == PRE_ACT and p.act.name != "identity"
    dresidual = torch.empty_like(x) if writes_dresidual else None
    if need_dresidual and dresidual is None and p.residual_mode in (PRE_ACT, POST_ACT):
        dresidual = dy  # dz itself
    wanted = _Gradients(p, weight, bias, act_weight, rule_weight, need_parameters)
    centre = mean if p.centred else None
    with on_device_of(x):
        written = dresidual if writes_dresidual else None
        if p.scope == POSITION:
            _grad_positions(p, plan, dy, dh, x, source, dx, written, centre, rstd, weight, bias, act_weight, wanted)
        elif plan.route == SINGLE_PASS:
            _grad_single_pass(p, plan, dy, x, source, dx, written, centre, rstd, weight, bias, act_weight, wanted)
        else:
            _grad_two_pass(p, plan, dy, x, source, dx, written, centre, rstd, weight, bias, act_weight, wanted)
    return dx, dresidual, *wanted.results()


class _Gradients:
    """The gradients of the parameters that were asked for; what one shared value collects is summed over the channels last."""

    def __init__(
        self,
        p: Problem,
        weight: Tensor | None,
        bias: Tensor | None,
        act_weight: Tensor | None,
        rule_weight: Tensor | None,
        needed: bool,
    ) -> None:
        def like(parameter: Tensor | None) -> Tensor | None:
            if parameter is None or not needed:
                return None
            if parameter.numel() == p.C:
                return torch.empty_like(parameter)
            return torch.empty(p.C, dtype=p.accumulate, device=parameter.device)

        self.needed = needed and any(t is not None for t in (weight, bias, act_weight, rule_weight))
        self.weight, self.bias, self.act, self.rule = like(weight), like(bias), like(act_weight), like(rule_weight)
        self.act_weight, self.rule_weight = act_weight, rule_weight

    def results(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, _shared(self.act, self.act_weight), _shared(self.rule, self.rule_weight)


def _shared(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None or gradient.numel() == parameter.numel():
        return gradient
    return gradient.sum().to(parameter.dtype).reshape(parameter.shape)


def _partials(p: Problem, x: Tensor, wanted: _Gradients, *shape: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for the partial sums of dz, dz*(x - centre) and of act_weight's gradient."""
    part = _like(p, x, (3 if wanted.act is not None else 2, *shape))
    return part[0], part[1], part[2] if wanted.act is not None else None


def _grad_channels(
    p: Problem,
    part: tuple[Tensor, Tensor, Tensor | None],
    outer: int,
    chunks: int,
    D: int,
    rstd: Tensor | None,
    weight: Tensor | None,
    wanted: _Gradients,
    q: Tensor | None = None,
    r: Tensor | None = None,
) -> None:
    programs, blocks = _merge(("BC", "BP"), p.C, chunks * outer)
    launch(
        grad_channels_kernel, programs, *part, rstd, weight, wanted.rule_weight if wanted.rule is not None else None,
        wanted.weight, wanted.bias, wanted.act, wanted.rule, q, r, outer, p.C, D, chunks, p.count,
        RULE=p.rule, EPS_PER_CHANNEL=wanted.rule_weight is not None and wanted.rule_weight.numel() > 1, **_type(p), **blocks,
    )  # fmt: skip


def _grad_sums(
    p: Problem,
    plan: Plan,
    dy: Tensor,
    x: Tensor,
    source: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    part: tuple[Tensor, Tensor, Tensor | None],
    centre: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    act_weight: Tensor | None,
    slices: bool = False,
    residual_scale: Tensor | None = None,
    dshifted: Tensor | None = None,
    against: Tensor | None = None,
) -> None:
    g, t = plan.geometry, plan.stream
    launch(
        grad_moments_kernel, t.programs, x, dy, dshifted, source, dx, dresidual, *part, centre, scale, weight, shift, act_weight,
        residual_scale, against, g.outer, g.inner, g.C, g.D, *_where(g, t),
        POSITION=p.scope == POSITION, SLICES=slices, **_source(p, source, slices),
        **_activation(p, act_weight), **_type(p), **_tiles(g, t),
    )  # fmt: skip


def _grad_output(
    p: Problem,
    plan: Plan,
    dy: Tensor,
    x: Tensor,
    source: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    centre: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    act_weight: Tensor | None,
    dz_scale: Tensor | None,
    q: Tensor | None,
    r: Tensor | None,
    slices: bool = False,
    residual_scale: Tensor | None = None,
    dshifted: Tensor | None = None,
) -> None:
    if dx is None and dresidual is None:
        return
    g, t = plan.geometry, plan.stream
    launch(
        grad_apply_kernel, t.programs, x, dy, dshifted, source, dx, dresidual, centre, scale, weight, shift, act_weight, dz_scale, q, r,
        residual_scale, g.inner, g.C, g.D, *_where(g, t),
        SLICES=slices, **_source(p, source, slices), **_activation(p, act_weight), **_type(p), **_tiles(g, t),
    )  # fmt: skip


def _grad_two_pass(
    p: Problem,
    plan: Plan,
    dy: Tensor,
    x: Tensor,
    source: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    centre: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    wanted: _Gradients,
) -> None:
    g, t = plan.geometry, plan.stream
    statistics = (centre, rstd, weight, bias, act_weight)
    if not p.batch_statistics:  # the statistics are constants: one pass does both
        if not wanted.needed:
            _grad_output(p, plan, dy, x, source, dx, dresidual, *statistics, None, None, None)
            return
        part = _partials(p, x, wanted, t.chunks, g.outer, g.C)
        _grad_sums(p, plan, dy, x, source, dx, dresidual, part, *statistics)
        _grad_channels(p, part, g.outer, t.chunks, g.D, rstd, weight, wanted)
        return
    dz_scale = q = r = None
    alone = not p.centred and p.count == 1
    if wanted.needed or (not alone and dx is not None):
        part = _partials(p, x, wanted, t.chunks, g.outer, g.C)
        _grad_sums(p, plan, dy, x, source, None, None, part, *statistics)
        if dx is not None and not alone:
            q = _like(p, x, p.moments_shape)
            r = torch.empty_like(q) if p.centred else None
        set_is_channel = p.scope == CHANNEL
        if wanted.needed or set_is_channel:
            _grad_channels(p, part, g.outer, t.chunks, g.D, rstd, weight, wanted, *((q, r) if set_is_channel else ()))
        if q is not None and not set_is_channel:
            programs, blocks = _merge(("BSET", "BP"), g.sets, t.chunks * g.D)
            launch(
                grad_sets_kernel, programs, part[0], part[1], rstd, weight, q, r, g.outer, g.C, g.D, t.chunks, g.sets, p.count,
                RULE=p.rule, **_type(p), **blocks,
            )  # fmt: skip
    if alone and dx is not None:
        eps = p.eps if wanted.rule_weight is None else p.eps + wanted.rule_weight.to(p.accumulate).abs()
        dz_scale = rstd**3 * eps
    _grad_output(p, plan, dy, x, source, dx, dresidual, *statistics, dz_scale, q, r)


def _grad_single_pass(
    p: Problem,
    plan: Plan,
    dy: Tensor,
    x: Tensor,
    source: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    centre: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    wanted: _Gradients,
) -> None:
    g, t = plan.geometry, plan.sets
    assert t is not None
    by_row = p.scope == SAMPLE_GROUP
    part: tuple[Tensor | None, Tensor | None, Tensor | None] = (wanted.bias, wanted.weight, wanted.act)
    if by_row:
        part = _partials(p, x, wanted, g.outer, g.C) if wanted.needed else (None, None, None)
    launch(
        grad_single_pass_kernel, t.programs, x, dy, source, dx, dresidual, centre, rstd, weight, bias, act_weight, wanted.rule_weight,
        *part, None if by_row else wanted.rule, g.D, *_set_strides(g, t), p.count,
        RULE=p.rule, GIVEN=not p.batch_statistics, **_source(p, source), NHWC=g.nhwc, ROWS_ARE_CHANNELS=by_row,
        **_activation(p, act_weight), **_type(p), **_sets(g, t),
    )  # fmt: skip
    if wanted.needed and by_row:
        _grad_channels(p, part, g.outer, 1, g.D, rstd, weight, wanted)  # type: ignore[arg-type]


def _grad_positions(
    p: Problem,
    plan: Plan,
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    source: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    centre: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    wanted: _Gradients,
) -> None:
    g, t, s = plan.geometry, plan.rows, plan.stream
    assert t is not None
    programs = cdiv(t.all_blocks, t.BLOCKS)
    in_launch = wanted.needed and t.BLOCKS_C == 1
    part = _partials(p, x, wanted, *((programs, p.C) if t.BLOCKS_C == 1 else (s.chunks, p.C))) if wanted.needed else (None,) * 3
    if dx is not None or dresidual is not None or in_launch:
        launch(
            grad_positions_kernel, programs, x, dy, dh, source, dx, dresidual, centre, rstd, weight, bias, act_weight,
            *(part if in_launch else (None,) * 3), g.C, g.S, t.blocks, t.all_blocks,
            EPS=p.eps, SOURCE=p.z_source or "x", ONE=p.count == 1, BLOCKS=t.BLOCKS,
            **_activation(p, act_weight), **_type(p), **_rows(g, t),
        )  # fmt: skip
    if wanted.needed:
        if not in_launch:
            _grad_sums(p, plan, dy, x, source, None, None, part, centre, rstd, weight, bias, act_weight)  # type: ignore[arg-type]
        _grad_channels(p, part, 1, programs if in_launch else s.chunks, 1, None, weight, wanted)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ the steps, one set per (n, c)
def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    var = _like(p, x, p.moments_shape)
    mean = torch.empty_like(var) if p.centred else torch.zeros_like(var)
    with on_device_of(x):
        _moments(p, plan_for(p), x, (mean if p.centred else None, var, None, None), (None, None, None), False)
    return mean, var


def apply(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    y = torch.empty_like(x) if need_y else None
    shifted = None if shift_after is None else torch.empty_like(x)
    residual = residual if p.residual_mode is not None else None
    more = {"residual_scale": residual_scale, "shift_after": shift_after, "shifted": shifted}
    with on_device_of(x):
        _apply(p, plan_for(p), x, residual, y, None, None, scale, None, shift, act_weight, slices=True, **more)
    return y, shifted


def grad_moments(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, dshifted: Tensor | None = None, against: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    plan = plan_for(p)
    g, t = plan.geometry, plan.stream
    source = z_source if p.z_source is not None else None
    wanted = _Gradients(p, None, None, act_weight if p.act.takes_weight else None, None, True)
    part = _partials(p, x, wanted, t.chunks, g.outer, g.C)
    more = {"residual_scale": residual_scale, "dshifted": dshifted, "against": against}
    with on_device_of(x):
        _grad_sums(p, plan, dy, x, source, None, None, part, mean, scale, None, shift, act_weight, slices=True, **more)
    sum_dz, sum_dz_xc = (sums.sum(0) if t.chunks > 1 else sums[0] for sums in part[:2])
    if part[2] is None or act_weight is None:
        return sum_dz, sum_dz_xc, None
    dact_weight = part[2].sum((0, 1)) if act_weight.numel() > 1 else part[2].sum()
    return sum_dz, sum_dz_xc, dact_weight.to(act_weight.dtype).reshape(act_weight.shape)


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
    plan = plan_for(p)
    source = z_source if p.z_source is not None else None
    dx = torch.empty_like(x) if needs[0] else None
    dresidual = None
    own = p.act.name != "identity" or residual_scale is not None or dshifted is not None
    if needs[1] and p.residual_mode == PRE_ACT and own:
        dresidual = torch.empty_like(x)
    more = {"residual_scale": residual_scale, "dshifted": dshifted}
    with on_device_of(x):
        _grad_output(p, plan, dy, x, source, dx, dresidual, mean, scale, None, shift, act_weight, dz_scale, q, r, slices=True, **more)
    if needs[1] and dresidual is None and p.residual_mode in (PRE_ACT, POST_ACT):
        dresidual = dy
    return dx, dresidual


def _steps() -> Any:
    return sys.modules[__package__]


# importing the kernels has put their modules under these names into the package
for _step in (moments, apply, grad_moments, grad_apply):
    setattr(sys.modules[__package__], _step.__name__, _step)
