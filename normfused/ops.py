"""Operators, their fake kernels, and autograd: once, for all norms and backends.

A call goes one of two ways. *Fused*: `NormAct`, an autograd Function over the operators ``normfused::norm_act`` and
``normfused::norm_act_backward``, which run a backend's kernels and save x and the moments. *Composite*: differentiable ATen
operations (`backends.torch.composite`), wherever autograd or a tracer must see through the norm, and on the torch backend
wherever ATen's own kernel is accurate. Rules written in PyTorch go through `SliceNormAct` and four more operators.

The operators take plain numbers and strings, so that one schema serves every norm; the backend's name travels with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import compiling, dispatch
from .activations import Activation, grad_activate_from_y
from .backends.torch import composite
from .problem import (
    BATCH_INSTANCE,
    CHANNEL,
    MEAN_ONLY,
    NHWC,
    POSITION,
    POST_ACT,
    PRE_ACT,
    PRE_NORM,
    RENORM,
    RMS,
    SAMPLE_GROUP,
    Problem,
    accumulation_dtype,
    dense,
    empty_like,
    format_of,
    layout_of,
)

__all__ = ["NormAct", "SliceNormAct", "norm_act", "see_through", "slice_norm_act", "snapshot", "without_autocast"]

Bounds = tuple[Tensor, Tensor]  # r_max and d_max of Batch Renorm, a value each on x's device

_ACT = "str act, float p0, float p1, str? residual_mode, str backend"
_STATIC = f"str scope, str rule, int groups, bool batch_statistics, float eps, float? momentum, {_ACT}"
_library = torch.library.Library("normfused", "DEF")
_library.define(
    "norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? act_weight, Tensor? rule_weight,"
    f" Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, {_STATIC},"
    " *, Tensor? r_max=None, Tensor? d_max=None) -> (Tensor y, Tensor mean, Tensor rstd, Tensor h)"
)
_library.define(
    "norm_act_backward(Tensor dy, Tensor? dh, Tensor x, Tensor? z_source, Tensor? weight, Tensor? bias, Tensor? act_weight,"
    f" Tensor? rule_weight, Tensor mean, Tensor rstd, {_STATIC}, bool need_x, bool need_residual, bool need_parameters)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dact_weight, Tensor drule_weight)"
)
_library.define("snapshot(Tensor buffer) -> Tensor")
_library.define("moments(Tensor x, str backend) -> (Tensor mean, Tensor var)")
_library.define(
    f"apply(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor? act_weight, {_ACT}, Tensor? residual_scale=None,"
    " Tensor? shift_after=None, bool need_y=True) -> (Tensor y, Tensor shifted)"
)
_library.define(
    "grad_moments(Tensor dy, Tensor x, Tensor? z_source, Tensor mean, Tensor scale, Tensor shift, Tensor? act_weight,"
    f" {_ACT}, Tensor? residual_scale=None, Tensor? dshifted=None, Tensor? against=None)"
    " -> (Tensor sum_dz, Tensor sum_dz_xc, Tensor dact_weight)"
)
_library.define(
    "grad_apply(Tensor dy, Tensor x, Tensor? z_source, Tensor mean, Tensor scale, Tensor shift, Tensor? act_weight,"
    f" Tensor dz_scale, Tensor q, Tensor r, {_ACT}, bool need_x, bool need_residual, Tensor? residual_scale=None, Tensor? dshifted=None)"
    " -> (Tensor dx, Tensor dresidual)"
)


def _problem(
    x: Tensor,
    scope: str,
    rule: str,
    groups: int,
    batch_statistics: bool,
    eps: float,
    momentum: float | None,
    act: str,
    p0: float,
    p1: float,
    residual_mode: str | None,
) -> Problem:
    n, c = x.shape[0], x.shape[1]
    return Problem(
        scope=scope,
        rule=rule,
        N=n,
        C=c,
        S=x.numel() // (n * c) if n * c else 0,
        groups=groups,
        layout=format_of(x),
        dtype=x.dtype,
        device=x.device,
        eps=eps,
        momentum=momentum,
        batch_statistics=batch_statistics,
        act=Activation(act, p0, p1),
        residual_mode=residual_mode,
    )


_activation = lru_cache(maxsize=1024)(Activation)


@lru_cache(maxsize=4096)
def _known_problem(
    n: int, c: int, numel: int, layout: str, dtype: torch.dtype, device: torch.device, scope: str, rule: str, groups: int,
    batch_statistics: bool, eps: float, momentum: float | None, act: str, p0: float, p1: float, residual_mode: str | None,
) -> Problem:  # fmt: skip
    return Problem(
        scope, rule, n, c, numel // (n * c) if n * c else 0, groups, layout, dtype, device, eps, momentum, batch_statistics,
        _activation(act, p0, p1), residual_mode,
    )  # fmt: skip


def _problem_of(x: Tensor, *numbers: Any) -> Problem:
    """`_problem` for the real kernels, whose sizes are plain numbers: remembered, since making one costs as much as an operator."""
    return _known_problem(x.size(0), x.size(1), x.numel(), format_of(x), x.dtype, x.device, *numbers)


def _slices(x: Tensor, act: str = "identity", p0: float = 0.0, p1: float = 0.0, residual_mode: str | None = None) -> Problem:
    return _problem_of(x, SAMPLE_GROUP, "standard", x.shape[1], True, 0.0, None, act, p0, p1, residual_mode)


def _operand(t: Tensor, layout: str, backend: str) -> Tensor:
    """t itself if it is dense in ``layout`` or the backend reads its strides, else a dense copy."""
    return t if layout_of(t) == layout or dispatch.load(backend).reads(t) else dense(t, layout)


def _other(t: Tensor | None, p: Problem, backend: str) -> Tensor | None:
    return None if t is None else _operand(t, p.layout, backend)


def _moments_shape(x: Tensor, scope: str, rule: str, groups: int) -> list[Any]:
    if rule == BATCH_INSTANCE:
        return [1 + x.shape[0], x.shape[1]]
    if scope == CHANNEL:
        return [x.shape[1]]
    if scope == SAMPLE_GROUP:
        return [x.shape[0], groups]
    spatial = 1
    for size in x.shape[2:]:
        spatial = spatial * size
    return [x.shape[0], spatial]


# ------------------------------------------------------------------------------------------------- real kernels
def _norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    *static: Any,
    r_max: Tensor | None = None,
    d_max: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    p, backend = _problem_of(x, *static[:-1]), static[-1]
    tensors = (weight, bias, act_weight, rule_weight)
    x = _operand(x, p.layout, backend)
    buffers = (running_mean, running_var, counter)
    return _run_forward(p, backend, x, _other(residual, p, backend), *tensors, *buffers, bounds=_bounds(r_max, d_max))


def _bounds(r_max: Tensor | None, d_max: Tensor | None) -> Bounds | None:
    return None if r_max is None or d_max is None else (r_max, d_max)


def _run_forward(
    p: Problem, backend: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    rule_weight: Tensor | None, *buffers: Tensor | None, bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A backend's forward on tensors that it can read."""
    more = {} if bounds is None else {"bounds": bounds}
    found: tuple[Tensor, Tensor, Tensor, Tensor | None] = dispatch.load(backend).norm_act(
        p, x, residual, _flat(weight), _flat(bias), _flat(act_weight), _flat(rule_weight), *buffers, **more
    )
    return found


def step_z_source(act: Activation, dtype: torch.dtype, residual_mode: str | None, backend: str) -> str | None:
    """What the backward of the steps needs beside x to know act'(z): None, ``"y"`` or ``"residual"``."""
    if residual_mode != PRE_ACT or act.name == "identity":
        return None
    return "y" if backend != "cuda" and act.derivative_from_y(dtype) else "residual"


def _z_source(p: Problem, backend: str) -> str | None:
    """The same of a whole norm, which may leave a ``"mask"``."""
    source = step_z_source(p.act, p.dtype, p.residual_mode, backend)
    if source and backend in ("cuda", "triton") and p.act.has_two_slopes and dispatch.load(backend).mask_bytes(p):
        return "mask"
    return source


def _norm_act_backward(
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
    *static: Any,
) -> tuple[Tensor | None, ...]:
    *numbers, backend, need_x, need_residual, need_parameters = static
    p = _problem_of(x, *numbers)
    tensors = (_operand(x, p.layout, backend), _other(z_source, p, backend), weight, bias, act_weight, rule_weight, mean, rstd)
    return _run_backward(p, backend, dy, dh, *tensors, (need_x, need_residual, need_parameters))


def _run_backward(
    p: Problem, backend: str, dy: Tensor, dh: Tensor | None, x: Tensor, z_source: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, act_weight: Tensor | None, rule_weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """A backend's backward for an x and a z_source that it can read.

    None for what is not needed; gradients of parameters in the parameters' shapes.
    """
    dx, dresidual, dweight, dbias, dact_weight, drule_weight = dispatch.load(backend).norm_act_backward(
        p, _operand(dy, p.layout, backend), _other(dh, p, backend), x, z_source,
        _flat(weight), _flat(bias), _flat(act_weight), _flat(rule_weight), mean, rstd, needs,
    )  # fmt: skip
    if not needs[2]:
        return dx if needs[0] else None, dresidual if needs[1] else None, None, None, None, None
    return (
        dx if needs[0] else None,
        dresidual if needs[1] else None,
        None if weight is None else _shaped(dweight, weight),
        None if bias is None else _shaped(dbias, bias),
        None if act_weight is None else _shaped(dact_weight, act_weight),
        None if rule_weight is None else _shaped(drule_weight, rule_weight),
    )


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return gradient if gradient is None or gradient.dim() == like.dim() == 1 else gradient.reshape(like.shape)


def _flat(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dim() == 1 and parameter.is_contiguous()):
        return parameter
    return parameter.reshape(-1).contiguous()


def _every_output(kernel: Callable[..., tuple[Tensor | None, ...]], x_at: int) -> Callable[..., tuple[Tensor, ...]]:
    """A kernel as an operator's, whose outputs are all tensors: what is absent is empty."""

    def operator(*arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        return tuple(arguments[x_at].new_empty(0) if t is None else t for t in kernel(*arguments, **more))

    return operator


def _moments(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    p = _slices(x)
    mean, var = dispatch.load(backend).moments(p, _operand(x, p.layout, backend))
    return mean, var


def _check_step(op: str, residual_mode: str | None, residual_scale: Tensor | None, dshifted: Tensor | None = None) -> None:
    if residual_scale is not None and residual_mode != PRE_ACT:
        raise ValueError(f"{op}: residual_scale needs residual_mode 'pre_act', got {residual_mode!r}")
    if residual_scale is not None and residual_scale.numel() != 1:
        raise ValueError(f"{op}: residual_scale must have one value, got shape {tuple(residual_scale.shape)}")
    if dshifted is not None and residual_mode == POST_ACT:
        raise ValueError(f"{op}: dshifted needs residual_mode None or 'pre_act', got {residual_mode!r}")


def _one(factor: Tensor | None, p: Problem) -> Tensor | None:
    return None if factor is None else factor.reshape(1).to(p.accumulate)


def _apply(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    act: str, p0: float, p1: float, residual_mode: str | None, backend: str,
    residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    _check_step("apply", residual_mode, residual_scale)
    if not need_y and shift_after is None:
        raise ValueError("apply: shift_after must be given where y is not needed, got None")
    p = _slices(x, act, p0, p1, residual_mode)
    y, shifted = dispatch.load(backend).apply(
        p, _operand(x, p.layout, backend), _other(residual, p, backend), scale.contiguous(), shift.contiguous(), _flat(act_weight),
        _one(residual_scale, p), None if shift_after is None else shift_after.contiguous(), need_y,
    )  # fmt: skip
    return y, shifted


def _grad_moments(
    dy: Tensor, x: Tensor, z_source: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    act: str, p0: float, p1: float, residual_mode: str | None, backend: str,
    residual_scale: Tensor | None = None, dshifted: Tensor | None = None, against: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_step("grad_moments", residual_mode, residual_scale, dshifted)
    p = _slices(x, act, p0, p1, residual_mode)
    source = _other(z_source, p, backend)
    sum_dz, sum_dz_xc, dact_weight = dispatch.load(backend).grad_moments(
        p,
        _operand(dy, p.layout, backend),
        _operand(x, p.layout, backend),
        source,
        mean,
        *(t.contiguous() for t in (scale, shift)),
        _flat(act_weight),
        _one(residual_scale, p),
        _other(dshifted, p, backend),
        source if against is z_source else _other(against, p, backend),
    )
    if dact_weight is None or act_weight is None:
        return sum_dz, sum_dz_xc, x.new_empty(0)
    return sum_dz, sum_dz_xc, dact_weight.reshape(act_weight.shape)


def _grad_apply(
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
    act: str,
    p0: float,
    p1: float,
    residual_mode: str | None,
    backend: str,
    need_x: bool,
    need_residual: bool,
    residual_scale: Tensor | None = None,
    dshifted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_step("grad_apply", residual_mode, residual_scale, dshifted)
    p = _slices(x, act, p0, p1, residual_mode)
    dx, dresidual = dispatch.load(backend).grad_apply(
        p,
        _operand(dy, p.layout, backend),
        _operand(x, p.layout, backend),
        _other(z_source, p, backend),
        mean,
        *(t.contiguous() for t in (scale, shift)),
        _flat(act_weight),
        *(t.contiguous() for t in (dz_scale, q, r)),
        (need_x, need_residual, False),
        _one(residual_scale, p),
        _other(dshifted, p, backend),
    )
    return (
        dx if need_x and dx is not None else x.new_empty(0),
        dresidual if need_residual and dresidual is not None else x.new_empty(0),
    )


# ------------------------------------------------------------------------------------------------- fake kernels
def _fake_norm_act(
    x: Tensor, residual: Any, weight: Any, bias: Any, act_weight: Any, rule_weight: Any, rm: Any, rv: Any, nbt: Any, *static: Any,
    r_max: Any = None, d_max: Any = None,
) -> Any:  # fmt: skip
    scope, rule, groups, residual_mode = static[0], static[1], static[2], static[-2]
    *numbers, backend = static
    shape, wide = _moments_shape(x, scope, rule, groups), accumulation_dtype(x.dtype)
    mean = x.new_empty([0] if rule == RMS else shape, dtype=wide)
    h = empty_like(x) if residual_mode == PRE_NORM else x.new_empty(0)
    p = _problem(x, *numbers)
    if _z_source(p, backend) == "mask":
        h = x.new_empty(dispatch.load(backend).mask_bytes(p), dtype=torch.uint8)
    return empty_like(x), mean, x.new_empty([3, *shape] if rule == RENORM else shape, dtype=wide), h


def _fake_norm_act_backward(
    dy: Any,
    dh: Any,
    x: Tensor,
    z_source: Any,
    weight: Any,
    bias: Any,
    act_weight: Any,
    rule_weight: Any,
    mean: Any,
    rstd: Any,
    *static: Any,
) -> Any:
    *_, need_x, need_residual, need_parameters = static
    empty = x.new_empty(0)

    def parameter(t: Tensor | None) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need_parameters else x.new_empty(0)

    return (
        empty_like(x) if need_x else empty,
        empty_like(x) if need_residual else x.new_empty(0),
        *(parameter(t) for t in (weight, bias, act_weight, rule_weight)),
    )


def _fake_moments(x: Tensor, backend: str) -> Any:
    wide = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


def _fake_apply(
    x: Tensor, residual: Any, scale: Any, shift: Any, act_weight: Any, act: str, p0: float, p1: float, residual_mode: str | None,
    backend: str, residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> Any:  # fmt: skip
    _check_step("apply", residual_mode, residual_scale)
    return empty_like(x) if need_y else x.new_empty(0), x.new_empty(0) if shift_after is None else empty_like(x)


def _fake_grad_moments(
    dy: Any, x: Tensor, z_source: Any, mean: Tensor, scale: Any, shift: Any, act_weight: Tensor | None, *static: Any
) -> Any:
    dact_weight = x.new_empty(0) if act_weight is None else torch.empty_like(act_weight)
    return torch.empty_like(mean), torch.empty_like(mean), dact_weight


def _fake_grad_apply(
    dy: Any, x: Tensor, z_source: Any, mean: Any, scale: Any, shift: Any, act_weight: Any, dz_scale: Any, q: Any, r: Any,
    act: str, p0: float, p1: float, residual_mode: str | None, backend: str, need_x: bool, need_residual: bool, *step: Any,
) -> Any:  # fmt: skip
    return empty_like(x) if need_x else x.new_empty(0), empty_like(x) if need_residual else x.new_empty(0)


for _name, _real, _fake in (
    ("norm_act", _every_output(_norm_act, 0), _fake_norm_act),
    ("norm_act_backward", _every_output(_norm_act_backward, 2), _fake_norm_act_backward),
    ("moments", _moments, _fake_moments),
    ("apply", _every_output(_apply, 0), _fake_apply),
    ("grad_moments", _grad_moments, _fake_grad_moments),
    ("grad_apply", _grad_apply, _fake_grad_apply),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"normfused::{_name}", _fake, lib=_library)

_library.impl("snapshot", torch.clone, "CompositeExplicitAutograd")  # on any device
torch.library.register_fake("normfused::snapshot", torch.clone, lib=_library)

_ops = torch.ops.normfused
trace: list[tuple[str, str, str, str, Activation, str | None, Problem | None]] | None = None  # `explain` listens here


# ------------------------------------------------------------------------------------------------------ autograd
def _traced(x: Tensor) -> bool:
    """Whether somebody listens at the dispatcher."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or bool(torch._C._len_torch_dispatch_stack())


def _operator(real: Any, overload: Any, x: Tensor) -> Any:
    """The kernel itself where nobody listens at the dispatcher (saves its boxing in eager mode), else the registered operator."""
    return overload if _traced(x) else real


def moments(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (n, c) of a dense x, (N, C); as the next three, one of the backend's steps."""
    mean, var = _operator(_moments, _ops.moments, x)(x, backend)
    return mean, var


def apply(x: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    """(y, y + shift_after), None or empty where there is none; arguments as in the schema."""
    y, shifted = _operator(_apply, _ops.apply, x)(x, *call)
    return y, shifted


def grad_moments(dy: Tensor, x: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_dz, sum_dz_xc, gradient of act_weight or empty); arguments as in the schema."""
    sum_dz, sum_dz_xc, dact_weight = _operator(_grad_moments, _ops.grad_moments, x)(dy, x, *call)
    return sum_dz, sum_dz_xc, dact_weight


def grad_apply(dy: Tensor, x: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    """(dx, dresidual), empty where not needed; arguments as in the schema."""
    dx, dresidual = _operator(_grad_apply, _ops.grad_apply, x)(dy, x, *call)
    return dx, dresidual


def apply_function(function: Any, *arguments: Any) -> Any:
    """Function.apply without the signature binding that setup_context costs it (40 us against 6, measured)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def _none_if_empty(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if like is None or gradient is None or (gradient.numel() == 0 and like.numel() != 0) else gradient


class NormAct(torch.autograd.Function):
    """A whole norm. Saves x (in pre_norm mode h), the moments, the parameters and what `Problem.z_source` names; no running statistics."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        act_weight: Tensor | None,
        rule_weight: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counter: Tensor | None,
        r_max: Tensor | None,
        d_max: Tensor | None,
        static: tuple[Any, ...],
        p: Problem | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        call = (x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, counter)
        if _recomputes(x, static[-1]) and static[1] != MEAN_ONLY:
            return _forward_recomputed(*call, *static)
        if p is not None:
            return _run_forward(p, static[-1], *call, bounds=_bounds(r_max, d_max))
        out: tuple[Tensor, Tensor, Tensor, Tensor | None] = _ops.norm_act(*call, *static, r_max=r_max, d_max=d_max)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, act_weight, rule_weight, _, _, _, _, _, static, p = inputs
        y, mean, rstd, h = output
        residual_mode, backend = static[9:]
        z_source = None
        if residual_mode == PRE_ACT:
            source = _z_source(_problem(x, *static[:-1]) if p is None else p, backend)
            z_source = {None: None, "y": y, "residual": residual, "mask": h}[source]
        ctx.static, ctx.p = static, p
        ctx.recomputes = _recomputes(x, backend) and static[1] != MEAN_ONLY  # compiled autograd may run an eager forward's backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h if residual_mode == PRE_NORM else x, z_source, weight, bias, act_weight, rule_weight, mean, rstd)
        ctx.mark_non_differentiable(*((mean, rstd) if residual_mode == PRE_NORM or h is None else (mean, rstd, h)))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, _, _, dh = upstream
        x, z_source, weight, bias, act_weight, rule_weight, mean, rstd = ctx.saved_tensors
        static, p = ctx.static, ctx.p
        residual_mode = static[9]
        needs = ctx.needs_input_grad
        none = (None,) * 7
        if residual_mode != PRE_NORM:  # Dynamo hands over zeros for the unused output
            dh = None
        if dy is None:  # only h, or nothing, was used
            return (dh, dh, None, None, None, None, *none)
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or ctx.recomputes:
            return (*differentiable_backward(dy, dh, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, static, needs), *none)
        dresidual = None
        own_residual = residual_mode == PRE_ACT and needs[1]
        if residual_mode == POST_ACT or (own_residual and static[6] == "identity"):
            dresidual, own_residual = dy, False
        call = (dy, dh, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd)
        wanted = needs[0] or (residual_mode == PRE_NORM and needs[1]), own_residual, True in needs[2:6]
        if p is not None:
            dx, dz, *parameters = _run_backward(p, static[-1], *call, wanted)
        else:
            dx, dz, *parameters = _ops.norm_act_backward(*call, *static, *wanted)
        if own_residual:
            dresidual = dz
        elif residual_mode == PRE_NORM:
            dresidual = dx
        if p is None:  # the operator's absent outputs are empty
            of = (weight, bias, act_weight, rule_weight)
            parameters = [_none_if_empty(g, t) for g, t in zip(parameters, of, strict=True)]
        return (dx, dresidual, *parameters, *none)


def _recomputes(x: Tensor, backend: str) -> bool:
    """In eager mode the torch backend runs half types in float32 and recomputes the norm in the backward: it saves x, and rounds once."""
    return backend == "torch" and x.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_compiling()


def _forward_recomputed(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, act_weight, rule_weight, running_mean, running_var, counter, *static = rest
    scope, rule, groups, batch_statistics, eps, momentum, act, p0, p1, residual_mode, _ = static
    y, h = composite.norm_act(
        x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, counter,
        scope, rule, groups, batch_statistics, eps, momentum, Activation(act, p0, p1), residual_mode,
    )  # fmt: skip
    empty = x.new_empty(0)
    if batch_statistics:
        return y, empty, x.new_empty(0), x.new_empty(0) if h is None else h
    mean = running_mean.to(torch.float32, copy=True)
    return y, mean, (running_var.to(torch.float32) + eps).rsqrt(), empty


def own_node(t: Tensor | None, connected: bool) -> Tensor | None:
    """t as a graph node of its own, so that a gradient with respect to it does not run on through what t depends on."""
    if t is None:
        return None
    return t.view_as(t) if connected and t.requires_grad else t.detach().requires_grad_()


def differentiable_backward(
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
    static: Sequence[Any],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The backward as differentiable operations: the vector-Jacobian product of the composite, recomputed from what was saved."""
    scope, rule, groups, batch_statistics, eps, _, act_name, p0, p1, residual_mode, backend = static
    act, storage, wide = Activation(act_name, p0, p1), x.dtype, accumulation_dtype(x.dtype)
    create_graph = torch.is_grad_enabled()
    dresidual = dact_weight = None
    source = _z_source(_problem(x, *static[:-1]), backend)
    if residual_mode == POST_ACT:
        dresidual = dy
    upstream, epilogue_mode = dense(dy, format_of(x)).to(wide), residual_mode
    if residual_mode == PRE_ACT and source != "residual":
        assert z_source is not None or source is None
        if z_source is not None and source == "y":  # an output, so its own history carries the second derivative
            upstream = grad_activate_from_y(upstream, z_source, act)
        elif source == "mask":  # the slope of a straight piece; it has no derivative of its own
            with torch.no_grad():
                call = (torch.ones_like(x), dh, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, *static, False, True, False)
                slope = _norm_act_backward(*call)[1]
                assert slope is not None
                slope = slope.to(wide)
            if act_weight is not None and needs[4]:  # tlu: where z lies below, y is the threshold itself
                dact_weight = upstream * (1 - slope)
                kept = [1] if act_weight.numel() > 1 else []
                dact_weight = dact_weight.sum([d for d in range(x.dim()) if d not in kept]).reshape(act_weight.shape).to(act_weight.dtype)
            upstream = upstream * slope
        dresidual, act, epilogue_mode = upstream.to(storage), Activation("identity"), None
    elif residual_mode != PRE_ACT:
        epilogue_mode = None
    inputs: list[Tensor | None] = [x, z_source if epilogue_mode == PRE_ACT else None, weight, bias, act_weight, rule_weight]
    with torch.enable_grad():
        leaves = [own_node(t, create_graph) for t in inputs]
        xl, rl, wl, bl, al, el = leaves
        assert xl is not None
        xw = xl.to(wide)  # its gradient is taken, so that dh joins it before the one rounding
        if rule == BATCH_INSTANCE:
            assert el is not None
            given = None if batch_statistics else (mean[0], rstd[0])
            z = composite.batch_instance(xw, el.to(wide), wl, bl, given, eps)
            y = composite.activate_add(z, rl, act, al, epilogue_mode)
        elif batch_statistics:
            if rule == RENORM:  # r and d are constants
                wl, bl = composite.renormed(rstd, wl, bl)
            y, _ = composite.norm_act(
                xw, rl, wl, bl, al, el, None, None, None, scope, rule, groups, True, eps, None, act, epilogue_mode
            )  # fmt: skip
        else:
            z = composite.frozen(xw, None if wl is None else wl.to(wide), None if bl is None else bl.to(wide), mean, rstd)
            y = composite.activate_add(z, rl, act, al, epilogue_mode)
        wanted = [xw if t is xl else t for t, need in zip(leaves, needs[:6], strict=True) if t is not None and (need or t is xl)]
        found = iter(torch.autograd.grad(y, wanted, upstream, create_graph=create_graph, allow_unused=True))
    gradients = [next(found) if t is not None and (need or t is xl) else None for t, need in zip(leaves, needs[:6], strict=True)]
    dx = gradients[0]
    if dx is not None:
        dx = dense((dx if dh is None else dx + dh).to(storage), format_of(x))
    if residual_mode == PRE_NORM:
        dresidual = dx
    elif gradients[1] is not None:
        dresidual = gradients[1]
    if dact_weight is not None:
        gradients[4] = dact_weight
    return (dx, dresidual, *gradients[2:])


def snapshot(buffer: Tensor) -> Tensor:
    """A copy of a statistic that will be updated in place, for the backward.

    In compiled code by an operator: torch would save the buffer and make a copy that it knows again in the backward, after the update.
    """
    if torch.compiler.is_compiling() and not compiling.exporting():
        copied: Tensor = _ops.snapshot(buffer.detach())
        return copied
    return buffer.detach().clone()


def see_through() -> bool:
    """Whether something must see through the norm: a functorch transform, forward-mode AD, export."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or compiling.exporting()


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(x, ...)`` that autocast does not reach.

    "keep": ATen's operations must not be upcast behind our back; policy "torch" has cast before it came here.
    """

    @wraps(run)
    def norm_act(x: Tensor, *call: Any, **more: Any) -> Any:
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run(x, *call, **more)
        return run(x, *call, **more)

    return norm_act


@without_autocast
def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    scope: str,
    rule: str,
    groups: int,
    batch_statistics: bool,
    eps: float,
    momentum: float | None,
    act: Activation,
    residual_mode: str | None,
    backend: str | None,
    normalized_shape: Sequence[int] | None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, h) of a checked call: the one door to every backend.

    x is (N, C, *), or, with ``normalized_shape``, of any shape that ends in it (scope position). ``bounds``: r_max and d_max of the
    renorm rule, whose ``running_var`` is a deviation.
    With neither batch nor running statistics the norm is weight*x + bias per channel (eps is 0 then).
    """
    name = dispatch.choose(x.device.type, x.dtype, backend)
    if trace is not None:
        trace.append((name, path(x, name, scope, rule, groups), scope, rule, act, residual_mode, None))
    if x.numel() == 0:
        return _empty_batch(x, residual, weight, bias, act_weight, rule_weight, counter, batch_statistics, act, residual_mode)
    if path(x, name, scope, rule, groups) == "composite":
        if normalized_shape is not None and act_weight is not None and act_weight.numel() > 1:
            act_weight = act_weight.view(*[1] * (x.dim() - len(normalized_shape)), *normalized_shape)  # along the normalized elements
        eager = (
            not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
            and type(x) is Tensor
        )
        if eager and not batch_statistics and running_mean is None and weight is None:
            x = composite.format_gradient(x, format_of(x), eager, own=False)
        if not (batch_statistics or running_mean is None or running_var is None or see_through()) and torch.is_grad_enabled():
            running_mean, running_var = snapshot(running_mean), snapshot(running_var)  # a training forward may come before the backward
        return composite.norm_act(
            x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, counter,
            scope, rule, groups, batch_statistics, eps, momentum, act, residual_mode, eager, normalized_shape,
        )  # fmt: skip
    if not batch_statistics and running_mean is None:  # an affine map: the kernels have it as the norm of mean 0 and variance 1
        running_mean, running_var = (make(x.shape[1], dtype=accumulation_dtype(x.dtype)) for make in (x.new_zeros, x.new_ones))
    full = x.shape
    if normalized_shape is not None:
        rows = (-1, math.prod(normalized_shape))
        x, residual = x.reshape(rows), None if residual is None else residual.reshape(rows)
        weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    layout = format_of(x)
    x = _operand(x, layout, name)
    if residual is not None:
        residual = _operand(residual, layout, name)
    static = (scope, rule, groups, batch_statistics, eps, momentum, act.name, act.p0, act.p1, residual_mode, name)
    p = None if _traced(x) else _problem_of(x, *static[:-1])
    if trace is not None:
        trace[-1] = (*trace[-1][:-1], p)
    y, _, _, h = apply_function(
        NormAct, x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, counter,
        *(bounds or (None, None)), static, p,
    )  # fmt: skip
    if normalized_shape is not None:
        y = y.view(full)
        h = h.view(full) if residual_mode == PRE_NORM else h
    return y, (h if residual_mode == PRE_NORM else None)


def has_kernels(x: Tensor, backend: str | None, scope: str, rule: str) -> bool:
    """Whether a call of one of the rules that ATen has no kernel for is `norm_act`'s, else (`slice_norm_act`) a rule in PyTorch."""
    name = dispatch.choose(x.device.type, x.dtype, backend)
    own = name != "torch" or (rule == MEAN_ONLY and _recomputes(x, name))
    return own and path(x, name, scope, rule, 1) == "fused"


# Measured on 2 CPU cores: the sizes from which our own steps on ATen win over ATen's composition
_FRN_ELEMENTS = 16384
_CHANNELS_LAST_ELEMENTS = 65536


def path(x: Tensor, backend: str, scope: str, rule: str, groups: int) -> str:
    """``"fused"`` or ``"composite"`` (module docstring); also what `explain` reports."""
    if see_through() or x.device.type == "meta":
        return "composite"
    if torch.compiler.is_compiling():
        return "composite" if compiling.decomposes(backend) else "fused"
    if backend != "torch":
        return "fused"
    if _recomputes(x, backend):
        return "fused"
    if scope != SAMPLE_GROUP:
        return "composite"
    # ATen has no kernel for FRN, and its group norm in channels_last is made accurate at the cost of a pass over x, which does not pay
    # with one channel to a group; small tensors are faster composed all the same
    if rule == RMS:
        return "fused" if x.numel() >= _FRN_ELEMENTS else "composite"
    alone = groups == x.shape[1]
    return "fused" if alone and x.numel() >= _CHANNELS_LAST_ELEMENTS and format_of(x) == NHWC else "composite"


def _empty_batch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    counter: Tensor | None,
    batch_statistics: bool,
    act: Activation,
    residual_mode: str | None,
) -> tuple[Tensor, Tensor | None]:
    """No elements: empty y, zero parameter gradients, running statistics as they were, the counter one further."""
    if counter is not None and batch_statistics:
        counter.add_(1)
    y = x + residual if residual is not None else x.clone()
    h = y if residual_mode == PRE_NORM else None
    for parameter in (weight, bias, act_weight, rule_weight):
        if parameter is not None:
            y = y + (parameter.sum() * 0).to(y.dtype)
    return y, h


# ------------------------------------------------------------------------- rules written in PyTorch (route "slices")
@dataclass(frozen=True)
class SliceRule:
    """How the mean and variance of every (n, c) become an affine map; ``function(mean, var, *parameters)`` returns two tensors.

    Attributes:
        function: differentiable; what it returns is (N, C) or broadcasts to it.
        centred: False: (scale, shift), z = scale*x + shift. True: (scale, offset), z = scale*(x - mean) + offset; no large numbers
            cancel in its derivatives, however far the mean is from zero. Then a scale of None stands for 1.
        translation: the rule neither reads the variance, which may be None, nor scales.
    """

    function: Callable[..., tuple[Any, Any]]
    centred: bool = False
    translation: bool = False


class SliceNormAct(torch.autograd.Function):
    """moments -> the rule on (N, C) tensors -> apply; backward with the rule's own vjp between the two big passes."""

    @staticmethod
    def forward(
        rule: SliceRule, x: Tensor, residual: Tensor | None, act_weight: Tensor | None, act: str, p0: float, p1: float,
        residual_mode: str | None, backend: str, *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        mean, var = moments(x, backend)
        scale, shift = _coefficients(rule, mean, var, parameters)
        if rule.centred:
            shift = torch.addcmul(shift, scale, mean, value=-1)
        y, _ = apply(x, residual, scale, shift, act_weight, act, p0, p1, residual_mode, backend)
        return y, mean, var, scale, shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rule, x, residual, act_weight, act, p0, p1, residual_mode, backend, *parameters = inputs
        y, mean, var, scale, shift = output
        source = step_z_source(Activation(act, p0, p1), x.dtype, residual_mode, backend)
        z_source = {None: None, "y": y, "residual": residual}[source]
        ctx.rule, ctx.static = rule, (act, p0, p1, residual_mode, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var, scale, shift)
        ctx.save_for_backward(x, z_source, act_weight, mean, var, scale, shift, *parameters)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = upstream[0]
        x, z_source, act_weight, mean, var, scale, shift, *parameters = ctx.saved_tensors
        if dy is None:
            return (None,) * (9 + len(parameters))
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_slice_backward(ctx.rule, dy, x, z_source, act_weight, parameters, ctx.static, needs)
        *act, residual_mode, backend = static = ctx.static
        own_residual = residual_mode == PRE_ACT and needs[2] and act[0] != "identity"
        dz, dact_weight, dresidual = dy, None, None
        if backend == "torch" and act[0] != "identity" and not _traced(x):
            # its steps would each recompute z and dz in passes of their own
            dz, dact_weight = _activation_gradient(dy, x, z_source, scale, shift, act_weight, *static)
            dresidual = dz.to(x.dtype) if own_residual else None
            z_source, static, own_residual = None, ("identity", 0.0, 0.0, None, backend), False
        sums = grad_moments(dz, x, z_source, mean, scale, shift, act_weight, *static)
        sum_dz, sum_dz_xc = sums[:2]
        if dact_weight is None:
            dact_weight = sums[2]
        dmean, dvar, *dparameters = _coefficients_vjp(ctx.rule, mean, var, scale, parameters, sum_dz, sum_dz_xc)
        spatial = x.numel() // (x.shape[0] * x.shape[1])
        if needs[1] or own_residual:
            rest = (act_weight, scale, dvar * (2 / spatial), dmean / spatial, *static, needs[1], own_residual)
            dx, own = grad_apply(dz, x, z_source, mean, scale, shift, *rest)
            dresidual = own if own_residual else dresidual
        if residual_mode == POST_ACT or act[0] == "identity":
            dresidual = dy
        return (
            None,
            dx if needs[1] else None,
            dresidual if residual_mode is not None and needs[2] else None,
            _none_if_empty(dact_weight, act_weight),
            *(None,) * 5,
            *(None if g is None else g.to(t.dtype) for g, t in zip(dparameters, parameters, strict=True)),
        )


def _activation_gradient(
    dy: Tensor, x: Tensor, z_source: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None, *static: Any
) -> tuple[Tensor, Tensor | None]:
    """(dz in the accumulation type, gradient of act_weight) by a backend whose steps take tensors from each other."""
    *act, backend = static
    x = dense(x)
    p = _slices(x, *act)
    dz, dact_weight = dispatch.load(backend).activation_gradient(
        p, _other(dy, p, backend), x, _other(z_source, p, backend), scale, shift, _flat(act_weight)
    )
    return dz, dact_weight if act_weight is None else _shaped(dact_weight, act_weight)


def _coefficients(rule: SliceRule, mean: Tensor, var: Tensor | None, parameters: Any) -> tuple[Tensor, Tensor]:
    """What the rule returns, as full (N, C) tensors in the moments' type."""
    zero = torch.zeros_like(mean)
    found = rule.function(mean, var, *parameters)
    return tuple(zero + (1 if t is None else torch.as_tensor(t).to(mean.dtype)) for t in found)  # type: ignore[return-value]


def _coefficients_vjp(
    rule: SliceRule, mean: Tensor, var: Tensor, scale: Tensor, parameters: Any, sum_dz: Tensor, sum_dz_xc: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of mean, var and the parameters from the sums of dz and of dz*(x - mean)."""
    inputs = (mean, var, *parameters)
    of_scale = sum_dz_xc if rule.centred else torch.addcmul(sum_dz_xc, mean, sum_dz)
    gradients = (_traced_vjp if torch.compiler.is_compiling() else _vjp)(rule, inputs, (of_scale, sum_dz))
    rest = iter(gradients)
    dmean, dvar, *dparameters = (next(rest) if t.is_floating_point() else None for t in inputs)
    dmean, dvar = (torch.zeros_like(mean) if g is None else g for g in (dmean, dvar))
    if rule.centred:
        dmean = torch.addcmul(dmean, scale, sum_dz, value=-1)
    return dmean, dvar, *dparameters


def _vjp(rule: SliceRule, inputs: Sequence[Tensor], upstream: tuple[Tensor, Tensor]) -> Sequence[Tensor | None]:
    """Gradients of the inputs that have one."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        found = _coefficients(rule, leaves[0], leaves[1], leaves[2:])
        pairs = [(c, g) for c, g in zip(found, upstream, strict=True) if c.requires_grad]  # a rule may return a constant
        wanted = [t for t in leaves if t.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        return torch.autograd.grad([c for c, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)


def _traced_vjp(rule: SliceRule, inputs: Sequence[Tensor], upstream: tuple[Tensor, Tensor]) -> Sequence[Tensor | None]:
    """`_vjp` in a form that Dynamo follows into a compiled backward."""
    floating = [t for t in inputs if t.is_floating_point()]

    def coefficients(*given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        mean, var, *parameters = (next(rest) if t.is_floating_point() else t for t in inputs)
        return _coefficients(rule, mean, var, parameters)

    _, pull_back = torch.func.vjp(coefficients, *floating)[:2]
    gradients: tuple[Tensor, ...] = pull_back(upstream)
    return gradients


def _composite_slices(
    rule: SliceRule, x: Tensor, residual: Tensor | None, act_weight: Tensor | None, act: Activation, residual_mode: str | None,
    parameters: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y, mean, var) in differentiable operations; var is None where a translation has no use for it."""
    wide = x.to(accumulation_dtype(x.dtype))
    dims = list(range(2, x.dim()))
    ones = [1] * len(dims)

    def over_positions(t: Tensor) -> Tensor:
        return t.view(*x.shape[:2], *ones)

    # the sum's gradient is a view, the mean's a tensor of x's size
    mean = wide.sum(dims) / (x.numel() // (x.shape[0] * x.shape[1])) if dims else wide
    if rule.translation:
        _, offset = rule.function(mean, None, *parameters)
        z, var = wide + over_positions(offset - mean), None
    else:
        centred = wide - over_positions(mean)
        var = centred.square().mean(dims) if dims else torch.zeros_like(wide)
        scale, shift = _coefficients(rule, mean, var, parameters)
        z = torch.addcmul(over_positions(shift), centred if rule.centred else wide, over_positions(scale))
    return composite.activate_add(z, residual, act, act_weight, residual_mode).to(x.dtype), mean, var


def epilogue_to_redo(
    dy: Tensor, z_source: Tensor | None, dtype: torch.dtype, static: tuple[Any, ...]
) -> tuple[Activation, Tensor, Tensor | None, str | None]:
    """What a differentiable backward over the steps recomputes of activation and residual.

    (activation, gradient behind it, gradient of the residual, residual mode); where y tells the derivative, or the residual comes
    last, nothing of the residual is.
    """
    name, p0, p1, residual_mode, backend = static
    act = Activation(name, p0, p1)
    if residual_mode == POST_ACT:
        return act, dy, dy, None
    if residual_mode == PRE_ACT and step_z_source(act, dtype, residual_mode, backend) != "residual":
        dz = dy if z_source is None else grad_activate_from_y(dy, z_source, act)
        return Activation("identity"), dz, dz, None
    return act, dy, None, residual_mode


def _differentiable_slice_backward(
    rule: SliceRule, dy: Tensor, x: Tensor, z_source: Tensor | None, act_weight: Tensor | None, parameters: Any, static: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    act, upstream, dresidual, mode = epilogue_to_redo(dy, z_source, x.dtype, static)
    inputs = [x, z_source if mode else None, act_weight, *parameters]
    with torch.enable_grad():
        leaves = [t if t is None or not t.is_floating_point() else own_node(t, True) for t in inputs]
        xl, rl, al, *pl = leaves
        assert xl is not None
        y, _, _ = _composite_slices(rule, xl, rl, al, act, mode, pl)
        wanted = [t for t in leaves if t is not None and t.is_floating_point()]
        found = iter(torch.autograd.grad(y, wanted, upstream, create_graph=True, allow_unused=True))
    gradients = [None if t is None or not t.is_floating_point() else next(found) for t in leaves]
    if mode == PRE_ACT:
        dresidual = gradients[1]
    return (None, gradients[0], dresidual, gradients[2], *(None,) * 5, *gradients[3:])


def slice_norm_act(
    x: Tensor,
    rule: SliceRule,
    parameters: tuple[Tensor, ...],
    residual: Tensor | None,
    act_weight: Tensor | None,
    act: Activation,
    residual_mode: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) of a checked call; the moments (N, C) are returned for running statistics (None where no pass computed them)."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the composite must not be cast behind our back
        with torch.autocast(kind, enabled=False):
            return _slice_norm_act(x, rule, parameters, residual, act_weight, act, residual_mode, backend)
    return _slice_norm_act(x, rule, parameters, residual, act_weight, act, residual_mode, backend)


def _slice_norm_act(
    x: Tensor,
    rule: SliceRule,
    parameters: tuple[Tensor, ...],
    residual: Tensor | None,
    act_weight: Tensor | None,
    act: Activation,
    residual_mode: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    name = dispatch.choose(x.device.type, x.dtype, backend)
    # ATen's additions and sums are as few passes as a translation can have, and keep nothing of x
    composed = rule.translation and name == "torch" and not _recomputes(x, name)
    if trace is not None:
        trace.append((name, "composite" if composed else "slices", SAMPLE_GROUP, "written in PyTorch", act, residual_mode, None))
    if x.numel() == 0:
        y, _ = _empty_batch(x, residual, None, None, act_weight, None, None, False, act, residual_mode)
        for t in parameters:
            y = y + (t.sum() * 0).to(y.dtype)
        return y, None, None
    traced = see_through() or compiling.decomposes(name) or x.device.type == "meta"
    if composed and not traced:
        x = composite.format_gradient(dense(x), format_of(x), True, own=False)
    if composed or traced:
        y, mean, var = _composite_slices(rule, x, residual, act_weight, act, residual_mode, parameters)
        return y, mean.detach(), None if var is None else var.detach()
    layout = format_of(x)
    x = _operand(x, layout, name)
    if residual is not None:
        residual = _operand(residual, layout, name)
    y, mean, var, _, _ = apply_function(
        SliceNormAct, rule, x, residual, act_weight, act.name, act.p0, act.p1, residual_mode, name, *parameters
    )
    return y, mean, var


__all__ += ["POSITION", "SliceRule"]
