"""Step 3 of a norm on its own: y = act(scale*x + shift [+ residual_scale*residual]) and y + shift_after, for networks without norms.

One autograd Function over the operators ``normfused::apply``, ``grad_moments`` and ``grad_apply``, which every backend has. Where a
tracer or a transform must see through it, and in double backward, the same is composed of differentiable ATen operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, ops
from .activations import IDENTITY, Activation, ActivationLike, activate, grad_activate_from_y
from .backends.torch.activation import grad_activate_
from .norms.base import resolve_act
from .problem import PRE_ACT, accumulation_dtype, dense, layout_of

__all__ = ["act_bias", "affine_act", "rescaled_residual"]

_Numbers = tuple[Activation, float, float]  # activation; factors of x and of the residual where they are numbers
_Static = tuple[Activation, float, float, str, str]  # the same, outputs ("y", "shifted" or "both"), backend


def affine_act(
    x: Tensor,
    scale: Tensor | float | None = None,
    shift: Tensor | None = None,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | float = 1.0,
    shift_after: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Affine map, residual add, activation and bias in one operation: the last step of every norm, without the norm.

    .. math:: y = \mathrm{act}(a\, x + b_c \; [+\, s\, r]) \; [+\, d_c]

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format.
        scale: :math:`a`, a number, one value or (C,); None (default) for 1.
        shift: :math:`b`, (C,); None (default) for 0.
        act, act_param, backend: as in `batch_norm_act`.
        residual: :math:`r`, same shape and type as x.
        residual_scale: :math:`s`, a number (default 1) or one value. Of a and s the gradient of one costs a pass over x and r, that of
            both costs two.
        shift_after: :math:`d`, (C,), added after the activation; the input bias of the next layer.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Half types are computed in float32 and rounded once. Differentiable in x, scale, shift, residual, residual_scale, shift_after and
    act_param, twice; deterministic. The derivative of the activation is taken at its input, never read off y where ``shift_after`` was
    added: relu(z) + d > d fails for small z.
    """
    y: Tensor = _affine_act("affine_act", x, scale, shift, act, act_param, residual, residual_scale, shift_after, backend)
    return y


def act_bias(
    x: Tensor, bias: Tensor, *, act: ActivationLike = "relu", act_param: Tensor | None = None, backend: str | None = None
) -> Tensor:
    r"""Activation and the input bias of the next layer, :math:`y = \mathrm{act}(x) + b_c`; reads x once and writes y once.

    Args:
        x: (N, C, \*), usually what a convolution without bias returned.
        bias: (C,).
        act, act_param, backend: as in `batch_norm_act` (default ``"relu"``).

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        As `affine_act`, of which this is a case.

    Reference: Shao et al., *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
    """
    checks.floating("act_bias", x)
    checks.min_dim("act_bias", x, 2)
    if not isinstance(bias, Tensor):
        raise TypeError(f"act_bias: bias must be a Tensor, got {type(bias).__name__}")
    checks.parameter("act_bias", "bias", bias, x, x.shape[1])
    y: Tensor = _affine_act("act_bias", x, None, None, act, act_param, None, 1.0, bias, backend)
    return y


def rescaled_residual(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    beta: Tensor | float | None = None,
    *,
    act: ActivationLike = "relu",
    act_param: Tensor | None = None,
    next_bias: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    r"""The end of a residual block that normalizes nothing, :math:`y = \mathrm{act}(\alpha x + \beta F)`.

    Args:
        x: (N, C, \*), the block's input or what its shortcut made of it.
        branch: :math:`F`, same shape and type.
        alpha: a number; see `rescale_schedule`.
        beta: a number or one value (a learned multiplier, whose gradient costs a pass over F); None where the weight of the branch's
            last layer holds it (`RescaledResidual.fold`).
        act, act_param, backend: as in `batch_norm_act` (default ``"relu"``).
        next_bias: (C,), the input bias of the next block.

    Returns:
        y, a Tensor like x; with ``next_bias`` the pair (y, y + next_bias): the next block's shortcut and its convolution's input, both
        written in one pass over x and F. Backward, one pass reads both gradients and writes those of x and F.

    Raises:
        As `affine_act`, of which this is a case.

    Reference: Shao et al., *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
    """
    op = "rescaled_residual"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.residual(op, branch, x, "branch")
    checks.number(op, "alpha", alpha)
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            raise checks.ShapeError(f"{op}: beta must have one value, got shape {tuple(beta.shape)}")
        checks.parameter(op, "beta", beta.reshape(-1), x, 1)
    elif beta is not None:
        checks.number(op, "beta", beta, " or a tensor of one value")
    checks.parameter(op, "next_bias", next_bias, x, x.shape[1])
    both = next_bias is not None
    if beta is None:
        return _affine_act(op, x, alpha, None, act, act_param, branch, 1.0, next_bias, backend, both)
    return _affine_act(op, branch, beta, None, act, act_param, x, alpha, next_bias, backend, both)


def _affine_act(
    op: str,
    x: Tensor,
    scale: Tensor | float | None,
    shift: Tensor | None,
    act: ActivationLike,
    act_param: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | float,
    shift_after: Tensor | None,
    backend: str | None,
    both: bool = False,
) -> Any:
    """y + shift_after (y without one); ``both``: (y, y + shift_after)."""
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    channels = x.shape[1]
    number, residual_number = 1.0, 1.0
    if isinstance(scale, Tensor):
        checks.parameter(op, "scale", scale.reshape(-1) if scale.dim() == 0 else scale, x, 1 if scale.numel() == 1 else channels)
    elif scale is not None:
        number, scale = float(scale), None
    if isinstance(residual_scale, Tensor):
        if residual_scale.numel() != 1:
            raise checks.ShapeError(f"{op}: residual_scale must have one value, got shape {tuple(residual_scale.shape)}")
        checks.parameter(op, "residual_scale", residual_scale.reshape(-1), x, 1)
        factor = None if residual is None else residual_scale
    else:
        residual_number, factor = float(residual_scale), None
    checks.parameter(op, "shift", shift, x, channels)
    checks.parameter(op, "shift_after", shift_after, x, channels)
    if residual is not None:
        checks.residual(op, residual, x)
    fused, act_weight, composed = resolve_act(op, act, act_param, x, channels)
    tensors = (x, residual, scale, shift)
    numbers = (fused, number, residual_number)
    if composed is None:
        outputs = "y" if shift_after is None else "both" if both else "shifted"
        return _run(*tensors, shift_after, act_weight, factor, numbers, outputs, backend)
    y = composed(_run(*tensors, None, act_weight, factor, numbers, "y", backend))
    if shift_after is None:
        return y
    shifted = _run(y, None, None, None, shift_after, None, None, (IDENTITY, 1.0, 1.0), "shifted", backend)
    return (y, shifted) if both else shifted


def _run(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shift_after: Tensor | None,
    act_weight: Tensor | None,
    residual_scale: Tensor | None,
    numbers: _Numbers,
    outputs: str,
    backend: str | None,
) -> Any:
    name = dispatch.choose(x.device.type, x.dtype, backend)
    composite = ops.see_through() or torch.compiler.is_compiling() or x.device.type == "meta" or x.numel() == 0
    mode = None if residual is None else PRE_ACT
    if ops.trace is not None:
        ops.trace.append((name, "composite" if composite else "fused", "none", "affine", numbers[0], mode, None))
    kind = x.device.type
    if composite:
        tensors = (x, residual, scale, shift, shift_after, act_weight, residual_scale)
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _compose(*tensors, numbers, outputs)
        return _compose(*tensors, numbers, outputs)
    x = dense(x)
    if residual is not None:
        residual = dense(residual, layout_of(x))
    # where the backward tells the slope from y, y is written too; it is never read off y + shift_after
    keeps_y = outputs == "shifted" and name != "torch" and ops.step_z_source(numbers[0], x.dtype, mode, name) == "y"
    static = (*numbers, "both" if keeps_y else outputs, name)
    out = ops.apply_function(AffineAct, x, residual, scale, shift, shift_after, act_weight, residual_scale, static)
    return out[1] if keeps_y else out


# ------------------------------------------------------------------------------------------------- differentiable
def _over_channels(t: Tensor, x: Tensor) -> Tensor:
    """One value or (C,) in the accumulation type, shaped to broadcast against x."""
    t = t.to(accumulation_dtype(x.dtype))
    return t.reshape(-1) if t.numel() == 1 else t.view(1, -1, *[1] * (x.dim() - 2))


def _pre_activation(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual_scale: Tensor | None,
    numbers: _Numbers,
    inplace: bool = False,
) -> Tensor:
    """z in the accumulation type; x itself where there is nothing to do."""
    _, number, residual_number = numbers
    z = x.to(accumulation_dtype(x.dtype))
    if scale is not None and shift is not None:
        z = torch.addcmul(_over_channels(shift, x), z, _over_channels(scale, x))
    else:
        if scale is not None:
            z = z * _over_channels(scale, x)
        elif number != 1.0:
            z = z * number
        if shift is not None:
            z = z + _over_channels(shift, x)
    if residual is None:
        return z
    residual = residual.to(z.dtype)
    if residual_scale is not None:
        return torch.addcmul(z, residual, _over_channels(residual_scale, x))
    return z.add_(residual, alpha=residual_number) if inplace and z is not x else torch.add(z, residual, alpha=residual_number)


def _compose(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shift_after: Tensor | None,
    act_weight: Tensor | None,
    residual_scale: Tensor | None,
    numbers: _Numbers,
    outputs: str,
    inplace: bool = False,
) -> Any:
    """The outputs by ATen's operations, half types in float32 and rounded once; ``inplace`` writes over what it has made itself."""
    z = _pre_activation(x, residual, scale, shift, residual_scale, numbers, inplace)
    y = activate(z, numbers[0], act_weight, inplace=inplace and z is not x)
    shifted = None
    if shift_after is not None:
        after = _over_channels(shift_after, x)
        shifted = (y.add_(after) if inplace and y is not x and outputs == "shifted" else y + after).to(x.dtype)
    if outputs == "shifted":
        return shifted
    y = x.clone() if y is x else y.to(x.dtype)  # as every operation of torch, in memory of its own
    return y if outputs == "y" else (y, shifted)


# ------------------------------------------------------------------------------------------------------ autograd
def _coefficients(x: Tensor, values: Tensor | None, number: float) -> Tensor:
    """(N, C) numbers in the accumulation type, as the steps take them."""
    shape, wide = x.shape[:2], accumulation_dtype(x.dtype)
    if values is None:
        return torch.full(shape, number, dtype=wide, device=x.device)
    return values.to(wide).expand(shape).contiguous()


def _factor(x: Tensor, residual_scale: Tensor | None, number: float) -> Tensor | None:
    """The residual's factor as the steps take it; None for 1."""
    if residual_scale is None:
        return None if number == 1.0 else torch.full((1,), number, dtype=accumulation_dtype(x.dtype), device=x.device)
    return residual_scale.reshape(1).to(accumulation_dtype(x.dtype))


class AffineAct(torch.autograd.Function):
    """Saves x where the backward needs it, and what tells z where a residual was added: y if it can, else the residual."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        shift_after: Tensor | None,
        act_weight: Tensor | None,
        residual_scale: Tensor | None,
        static: _Static,
    ) -> Any:
        act, number, residual_number, outputs, backend = static
        if backend == "torch":
            return _compose(x, residual, scale, shift, shift_after, act_weight, residual_scale, static[:3], outputs, inplace=True)
        y, shifted = ops.apply(
            x, residual, _coefficients(x, scale, number), _coefficients(x, shift, 0.0), act_weight,
            act.name, act.p0, act.p1, None if residual is None else PRE_ACT, backend,
            None if residual is None else _factor(x, residual_scale, residual_number),
            None if shift_after is None else _coefficients(x, shift_after, 0.0), outputs != "shifted",
        )  # fmt: skip
        return {"y": y, "shifted": shifted, "both": (y, shifted)}[outputs]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, scale, shift, shift_after, act_weight, residual_scale, static = inputs
        act, _, _, outputs, backend = static
        y = {"y": output, "shifted": None, "both": output[0]}[outputs]
        source: str | None = None
        if act.name != "identity" and residual is not None:
            # the CUDA steps want the residual, unless y can stand in for z; then y is kept, as the next layer keeps it
            known = y is not None and act.derivative_from_y(x.dtype) and (backend != "cuda" or _same_slope_at_y(act))
            source = "y" if known else "residual"
        needs_x = ctx.needs_input_grad[2] or not (act.name == "identity" or source == "y")
        ctx.static, ctx.source, ctx.layout, ctx.has_residual = static, source, layout_of(x), residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if needs_x else None, {None: None, "y": y, "residual": residual}[source], residual if ctx.needs_input_grad[6] else None,
            scale, shift, act_weight, residual_scale,
        )  # fmt: skip
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in (scale, shift, shift_after, residual_scale)]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        outputs, backend = ctx.static[3:]
        dy, dshifted = upstream[0], upstream[1] if outputs == "both" else None
        after = {"y": None, "shifted": dy, "both": dshifted}[outputs]
        if dy is None:
            dy, dshifted = dshifted, None
        if dy is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(ctx, dy, dshifted)
        elif backend == "torch":
            gradients = _composed_backward(ctx, dy, dshifted)
        else:
            gradients = _fused_backward(ctx, dy, dshifted)
        dx, dresidual, dscale, dshift, dact_weight, dresidual_scale = gradients
        dafter = None if after is None or not ctx.needs_input_grad[4] else _channel_sum(after, ctx.like[2])
        return dx, dresidual, dscale, dshift, dafter, dact_weight, dresidual_scale, None


def _same_slope_at_y(act: Activation) -> bool:
    """Whether act'(act(z)) = act'(z), so that y may be taken for z."""
    return act.name in ("relu", "relu6") or (act.name == "leaky_relu" and act.p0 > 0)


_Gradients = tuple[Tensor | None, ...]  # of x, residual, scale, shift, act_weight, residual_scale


def _fused_backward(ctx: Any, dy: Tensor, dshifted: Tensor | None) -> _Gradients:
    """One launch for x and the residual, which reads dy and dshifted once; before it, one that sums, where numbers are trained."""
    x, z_source, residual, scale, shift, act_weight, residual_scale = ctx.saved_tensors
    act, number, residual_number, _, backend = ctx.static
    need_x, need_residual, need_scale, need_shift, _, need_weight, need_factor, _ = ctx.needs_input_grad
    given, dy = dy, dense(dy, ctx.layout)
    passes_on = act.name == "identity" and dshifted is None  # dz is dy
    a, factor = _coefficients(dy, scale, number), _factor(dy, residual_scale, residual_number) if ctx.has_residual else None
    zero = torch.zeros_like(a)
    # what z is recomputed from: x with its coefficients (and the residual), or y in the place of z
    at, slope, offset, against = dy if x is None else x, a, _coefficients(dy, shift, 0.0), None
    if ctx.source == "y":
        at, slope, offset, against = z_source, torch.ones_like(a), zero, x
        z_source = None if _same_slope_at_y(act) else z_source
    static = (act.name, act.p0, act.p1, PRE_ACT if ctx.has_residual else None, backend)
    of_z = (dy, at, z_source, zero, slope, offset, act_weight)
    dscale = dshift = dact_weight = dfactor = sum_dz = None
    if need_factor:
        sum_dz, sum_dz_r, dact_weight = ops.grad_moments(*of_z, *static, factor, dshifted, residual)
        dfactor = _summed(sum_dz_r, ctx.like[3])
    if need_scale or (sum_dz is None and (need_weight or (need_shift and not passes_on))):
        sum_dz, sum_dz_x, dact_weight = ops.grad_moments(*of_z, *static, factor, dshifted, against)
        dscale = _summed(sum_dz_x, ctx.like[0]) if need_scale else None
    if need_shift:
        dshift = _channel_sum(dy, ctx.like[1]) if sum_dz is None else _summed(sum_dz, ctx.like[1])
    alike = ctx.has_residual and scale is None and residual_scale is None and number == residual_number
    dx = given if need_x and passes_on and scale is None and number == 1.0 else None
    dresidual = given if need_residual and passes_on and factor is None else None
    writes = (
        (need_x or (need_residual and alike)) and dx is None and not (alike and dresidual is not None),
        need_residual and dresidual is None and not alike,
    )
    if any(writes):
        written = ops.grad_apply(*of_z, a, zero, zero, *static, *writes, factor, dshifted)
        dx, dresidual = (new if wanted else old for new, wanted, old in zip(written, writes, (dx, dresidual), strict=True))
    if alike and need_residual and dresidual is None:
        dresidual = dx
    return dx if need_x else None, dresidual, dscale, dshift, dact_weight if need_weight else None, dfactor


def _composed_backward(ctx: Any, dy: Tensor, dshifted: Tensor | None) -> _Gradients:
    """By ATen, in the accumulation type where anything is rounded."""
    x, z_source, residual, scale, shift, act_weight, residual_scale = ctx.saved_tensors
    act, number, residual_number = numbers = ctx.static[:3]
    need_x, need_residual, need_scale, need_shift, _, need_weight, need_factor, _ = ctx.needs_input_grad
    dtype = dy.dtype
    joined = dy if dshifted is None else dy.to(accumulation_dtype(dtype)) + dshifted
    dact_weight = None
    if act.name == "identity":
        dz = joined
    elif ctx.source == "y":
        dz = _from_y(joined, z_source, act)
    else:
        dz, dact_weight = _from_z(joined, x, z_source, scale, shift, act_weight, residual_scale, numbers)

    def against(t: Tensor, like: Any) -> Tensor:
        upstream, t = dense(dz, ctx.layout), t.to(dz.dtype)
        zero = torch.zeros(t.shape[:2], dtype=accumulation_dtype(t.dtype), device=t.device)
        return _summed(ops.grad_moments(upstream, t, None, zero, zero, zero, None, "identity", 0.0, 0.0, None, "torch")[1], like)

    def scaled(factor: Tensor | None, number: float) -> Tensor:
        if factor is None:
            return (dz if number == 1.0 else dz * number).to(dtype)
        return torch.mul(dz, _over_channels(factor, dz), out=torch.empty_like(dz)).to(dtype)

    return (
        scaled(scale, number) if need_x else None,
        scaled(residual_scale, residual_number) if need_residual else None,
        against(x, ctx.like[0]) if need_scale else None,
        _channel_sum(dz, ctx.like[1]) if need_shift else None,
        dact_weight if need_weight else None,
        against(residual, ctx.like[3]) if need_factor else None,
    )


def _summed(per_slice: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """(N, C) sums as the gradient of one value or of (C,)."""
    shape, dtype = like
    return (per_slice.sum() if shape.numel() == 1 else per_slice.sum(0)).reshape(shape).to(dtype)


def _channel_sum(dz: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    return dz.sum([d for d in range(dz.dim()) if d != 1], dtype=accumulation_dtype(dz.dtype)).to(like[1])


def _from_y(dy: Tensor, y: Tensor, act: Activation) -> Tensor:
    if act.name == "relu":
        return torch.ops.aten.threshold_backward(dy, y.to(dy.dtype), 0)  # type: ignore[no-any-return]
    wide = accumulation_dtype(dy.dtype)
    return grad_activate_from_y(dy.to(wide), y.to(wide), act)


def _from_z(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act_weight: Tensor | None,
    residual_scale: Tensor | None,
    numbers: _Numbers,
) -> tuple[Tensor, Tensor | None]:
    """(dz, gradient of act_weight) by ATen, in the accumulation type."""
    act = numbers[0]
    z = _pre_activation(x, residual, scale, shift, residual_scale, numbers, True)
    if z is x and act.name in ("sigmoid", "tanh"):  # whose gradient is written over z
        z = x.clone()
    dz, dweight = grad_activate_(dy.to(z.dtype), z, act, act_weight)
    if dweight is None or act_weight is None:
        return dz, None
    summed = dweight.sum([d for d in range(x.dim()) if d != 1]) if act_weight.numel() > 1 else dweight.sum()
    return dz, summed.reshape(act_weight.shape).to(act_weight.dtype)


def _differentiable_backward(ctx: Any, dy: Tensor, dshifted: Tensor | None) -> _Gradients:
    """The backward by operations that have a backward; where y tells the slope, y's own history carries the second derivative."""
    x, z_source, residual, scale, shift, act_weight, residual_scale = ctx.saved_tensors
    act, number, residual_number = numbers = ctx.static[:3]
    needs, given = ctx.needs_input_grad, dy.dtype
    dy = dy.to(accumulation_dtype(given))
    if dshifted is not None:
        dy = dy + dshifted
    if ctx.source == "y" or act.name == "identity":
        dz = dy if ctx.source is None else grad_activate_from_y(dy, z_source, act)

        def scaled(factor: Tensor | None, number: float) -> Tensor:
            return (dz * number if factor is None else dz * _over_channels(factor, dz)).to(given)

        def against(t: Tensor, like: Any) -> Tensor:
            return _summed((dz * t).flatten(2).sum(2) if t.dim() > 2 else dz * t, like)

        return (
            scaled(scale, number) if needs[0] else None,
            scaled(residual_scale, residual_number) if needs[1] else None,
            against(x, ctx.like[0]) if needs[2] else None,
            _channel_sum(dz, ctx.like[1]) if needs[3] else None,
            None,
            against(residual, ctx.like[3]) if needs[6] else None,
        )
    with torch.enable_grad():
        leaves = [ops.own_node(t, True) for t in (x, z_source, scale, shift, act_weight, residual_scale)]
        xl, rl, al, bl, wl, sl = leaves
        assert xl is not None
        y = activate(_pre_activation(xl, rl, al, bl, sl, numbers), act, wl)
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy, create_graph=True, allow_unused=True))
    return tuple(None if t is None else next(found) for t in leaves)
