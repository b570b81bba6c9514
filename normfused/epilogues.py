"""Step 3 of a norm on its own: y = act(scale*x + shift [+ residual]) [+ shift after], for networks that normalize nothing.

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

_Static = tuple[Activation, float, float, str]  # activation, scale as a number, scale of the residual, backend


def affine_act(
    x: Tensor,
    scale: Tensor | float | None = None,
    shift: Tensor | None = None,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
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
        residual_scale: :math:`s`, a number (default 1). Another one costs a pass over the residual; half types are then run in float32.
        shift_after: :math:`d`, (C,), added after the activation; the input bias of the next layer.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, scale, shift, residual, shift_after and act_param, twice; deterministic. The derivative of the activation is
    taken at its input, never read off y where ``shift_after`` was added: relu(z) + d > d fails for small z.
    """
    return _affine_act("affine_act", x, scale, shift, act, act_param, residual, residual_scale, shift_after, backend)


def act_bias(
    x: Tensor, bias: Tensor, *, act: ActivationLike = "relu", act_param: Tensor | None = None, backend: str | None = None
) -> Tensor:
    r"""Activation and the input bias of the next layer, :math:`y = \mathrm{act}(x) + b_c`; reads x once and writes y once for ReLU.

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
    return _affine_act("act_bias", x, None, None, act, act_param, None, 1.0, bias, backend)


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
        beta: a number or one value (a learned multiplier); None where the weight of the branch's last layer holds it
            (`RescaledResidual.fold`): then the activation is read and written three times in all, the least there is.
        act, act_param, backend: as in `batch_norm_act` (default ``"relu"``).
        next_bias: (C,), the input bias of the next block.

    Returns:
        y, a Tensor like x; with ``next_bias`` the pair (y, y + next_bias): the next block's shortcut and its convolution's input.

    Raises:
        As `affine_act`, of which this is a case.

    Reference: Shao et al., *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
    """
    op = "rescaled_residual"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    if not isinstance(branch, Tensor):
        raise TypeError(f"{op}: branch must be a Tensor, got {type(branch).__name__}")
    if branch.shape != x.shape:
        raise checks.ShapeError(f"{op}: branch must have the input's shape {tuple(x.shape)}, got {tuple(branch.shape)}")
    if isinstance(beta, Tensor) and beta.numel() != 1:
        raise checks.ShapeError(f"{op}: beta must have one value, got shape {tuple(beta.shape)}")
    checks.parameter(op, "next_bias", next_bias, x, x.shape[1])
    if beta is None:
        y = _affine_act(op, x, alpha, None, act, act_param, branch, 1.0, None, backend)
    else:
        y = _affine_act(op, branch, beta, None, act, act_param, x, alpha, None, backend)
    return y if next_bias is None else (y, _affine_act(op, y, None, next_bias, "identity", None, None, 1.0, None, backend))


def _affine_act(
    op: str,
    x: Tensor,
    scale: Tensor | float | None,
    shift: Tensor | None,
    act: ActivationLike,
    act_param: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    shift_after: Tensor | None,
    backend: str | None,
) -> Tensor:
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    channels = x.shape[1]
    number = 1.0
    if isinstance(scale, Tensor):
        checks.parameter(op, "scale", scale.reshape(-1) if scale.dim() == 0 else scale, x, 1 if scale.numel() == 1 else channels)
    elif scale is not None:
        number, scale = float(scale), None
    checks.parameter(op, "shift", shift, x, channels)
    checks.parameter(op, "shift_after", shift_after, x, channels)
    if residual is not None:
        checks.residual(op, residual, x)
    fused, act_weight, composed = resolve_act(op, act, act_param, x, channels)
    if composed is not None or (residual is not None and shift_after is not None):
        # with a residual the slope is kept as y before the shift, which is then a tensor of its own
        y: Tensor = _run(x, residual, scale, shift, None, act_weight, (fused, number, residual_scale), backend)
        y = y if composed is None else composed(y)
        return y if shift_after is None else _run(y, None, None, shift_after, None, None, (IDENTITY, 1.0, 1.0), backend)
    return _run(x, residual, scale, shift, shift_after, act_weight, (fused, number, residual_scale), backend)


def _run(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shift_after: Tensor | None,
    act_weight: Tensor | None,
    numbers: tuple[Activation, float, float],
    backend: str | None,
) -> Tensor:
    name = dispatch.choose(x.device.type, x.dtype, backend)
    composite = ops.see_through() or torch.compiler.is_compiling() or x.device.type == "meta" or x.numel() == 0
    if ops.trace is not None:
        mode = None if residual is None else PRE_ACT
        ops.trace.append((name, "composite" if composite else "fused", "none", "affine", numbers[0], mode, None))
    kind = x.device.type
    if composite:
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _compose(x, residual, scale, shift, shift_after, act_weight, numbers)
        return _compose(x, residual, scale, shift, shift_after, act_weight, numbers)
    x = dense(x)
    if residual is not None:
        residual = dense(residual, layout_of(x))
        wide = accumulation_dtype(x.dtype)
        if numbers[2] != 1.0 and name != "torch" and x.dtype != wide:
            # the steps add the residual as it is; scaled in a half type it would be rounded once more than y
            return _run(x.to(wide), residual.to(wide), scale, shift, shift_after, act_weight, numbers, name).to(x.dtype)
    y: Tensor = ops.apply_function(AffineAct, x, residual, scale, shift, shift_after, act_weight, (*numbers, name))
    return y


# ------------------------------------------------------------------------------------------------- differentiable
def _over_channels(t: Tensor, x: Tensor) -> Tensor:
    """One value or (C,) in the accumulation type, shaped to broadcast against x."""
    t = t.to(accumulation_dtype(x.dtype))
    return t.reshape(-1) if t.numel() == 1 else t.view(1, -1, *[1] * (x.dim() - 2))


def _pre_activation(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None, number: float, residual_scale: float, inplace: bool
) -> Tensor:
    """z in the accumulation type; x itself where there is nothing to do."""
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
    if residual is not None:
        residual = residual.to(z.dtype)
        z = z.add_(residual, alpha=residual_scale) if inplace and z is not x else torch.add(z, residual, alpha=residual_scale)
    return z


def _compose(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shift_after: Tensor | None,
    act_weight: Tensor | None,
    numbers: tuple[Activation, float, float],
    inplace: bool = False,
) -> Tensor:
    """y by ATen's operations, half types in float32 and rounded once; ``inplace`` writes over what it has made itself."""
    act, number, residual_scale = numbers
    z = _pre_activation(x, residual, scale, shift, number, residual_scale, inplace)
    fresh = inplace and z is not x
    y = activate(z, act, act_weight, inplace=fresh)
    if shift_after is not None:
        after = _over_channels(shift_after, x)
        y = y.add_(after) if inplace and y is not x else y + after
    if y is x:  # as every operation of torch, in memory of its own
        return x.clone()
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------------ autograd
def _coefficients(x: Tensor, values: Tensor | None, number: float) -> Tensor:
    """(N, C) numbers in the accumulation type, as the steps take them."""
    shape, wide = x.shape[:2], accumulation_dtype(x.dtype)
    if values is None:
        return torch.full(shape, number, dtype=wide, device=x.device)
    return values.to(wide).expand(shape).contiguous()


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
        static: _Static,
    ) -> Tensor:
        act, number, residual_scale, backend = static
        if backend == "torch":
            return _compose(x, residual, scale, shift, shift_after, act_weight, static[:3], inplace=True)
        if residual is not None and residual_scale != 1.0:  # the steps add the residual as it is
            residual = residual * residual_scale
        offset, after = shift, shift_after
        if shift_after is not None and act.name in ("identity", "relu"):  # one read and one write: relu(z) + d = max(z + d, d)
            offset, after = shift_after if shift is None else shift.to(accumulation_dtype(x.dtype)) + shift_after, None
            if act.name == "relu":
                act, act_weight = Activation("tlu"), shift_after.contiguous()
        mode = None if residual is None else PRE_ACT
        y: Tensor = ops.apply(
            x, residual, _coefficients(x, scale, number), _coefficients(x, offset, 0.0), act_weight, act.name, act.p0, act.p1, mode, backend
        )
        if after is not None:
            y = torch.add(y, _over_channels(after, x), out=torch.empty_like(y))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, residual, scale, shift, shift_after, act_weight, static = inputs
        act = static[0]
        source: str | None = None
        if act.name != "identity" and residual is not None:
            # of other activations the CUDA steps want the residual; where y will do without them it is kept, as the next layer keeps it
            source = "y" if act.derivative_from_y(x.dtype) and (static[3] != "cuda" or _exact_from_y(act, x.dtype)) else "residual"
        ctx.from_y = source == "y" and (_exact_from_y(act, x.dtype) or static[3] == "torch")
        needs_x = ctx.needs_input_grad[2] or not (act.name == "identity" or ctx.from_y)
        ctx.static, ctx.source = static, source
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_x else None, {None: None, "y": output, "residual": residual}[source], scale, shift, act_weight)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in (scale, shift, shift_after)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, z_source, scale, shift, act_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy, x, z_source, scale, shift, act_weight)
        act, number, residual_scale, backend = ctx.static
        need_x, need_residual, need_scale, need_shift, need_after, need_weight, _ = ctx.needs_input_grad
        dafter = _channel_sum(dy, ctx.like[2]) if need_after else None
        dx = dz = dact_weight = sum_dz = sum_dz_x = None
        if act.name == "identity":
            dz = dy
        elif ctx.from_y:
            dz = _from_y(dy, z_source, act)
        elif backend == "torch":
            dz, dact_weight = _from_z(dy, x, z_source, scale, shift, act_weight, ctx.static)
        if dz is None:
            dy = dense(dy, layout_of(x))
            if ctx.source == "residual" and residual_scale != 1.0:
                z_source = z_source * residual_scale
            a, b = _coefficients(x, scale, number), _coefficients(x, shift, 0.0)
            zero, mode = torch.zeros_like(a), None if z_source is None else PRE_ACT
            static = (act.name, act.p0, act.p1, mode, backend)
            if need_scale or need_shift or need_weight:
                sum_dz, sum_dz_x, dact_weight = ops.grad_moments(dy, x, z_source, zero, a, b, act_weight, *static)
            own = need_residual and z_source is not None
            dx, dz = ops.grad_apply(dy, x, z_source, zero, a, b, act_weight, a, zero, zero, *static, need_x, own)
        else:
            if need_x:
                dx = dz if scale is None and number == 1.0 else _scaled(dz, scale, number)
                dx = dx.to(dy.dtype)
            if need_scale:
                zero = torch.zeros(x.shape[:2], dtype=accumulation_dtype(x.dtype), device=x.device)
                plain = ("identity", 0.0, 0.0, None, backend)
                upstream = dense(dz if backend == "torch" else dz.to(x.dtype), layout_of(x))
                sum_dz, sum_dz_x, _ = ops.grad_moments(upstream, x, None, zero, zero, zero, None, *plain)
        dresidual = None
        if need_residual:
            assert dz is not None
            dresidual = (dz if residual_scale == 1.0 else dz * residual_scale).to(dy.dtype)
        dscale = dshift = None
        if need_scale:
            assert sum_dz_x is not None
            dscale = _summed(sum_dz_x, ctx.like[0])
        if need_shift:
            dshift = _channel_sum(dz, ctx.like[1]) if sum_dz is None else _summed(sum_dz, ctx.like[1])
        return dx if need_x else None, dresidual, dscale, dshift, dafter, dact_weight if need_weight else None, None


def _summed(per_slice: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """(N, C) sums as the gradient of one value or of (C,)."""
    shape, dtype = like
    return (per_slice.sum() if shape.numel() == 1 else per_slice.sum(0)).reshape(shape).to(dtype)


def _channel_sum(dz: Tensor | None, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    assert dz is not None
    return dz.sum([d for d in range(dz.dim()) if d != 1], dtype=accumulation_dtype(dz.dtype)).to(like[1])


def _scaled(dz: Tensor, scale: Tensor | None, number: float) -> Tensor:
    return dz * number if scale is None else torch.mul(dz, _over_channels(scale, dz), out=torch.empty_like(dz))


def _exact_from_y(act: Activation, dtype: torch.dtype) -> bool:
    """Whether dz needs no wider type than dy's: ReLU passes numbers on or not."""
    return act.name == "relu" or dtype == accumulation_dtype(dtype)


def _from_y(dy: Tensor, y: Tensor, act: Activation) -> Tensor:
    if act.name == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)  # type: ignore[no-any-return]
    wide = accumulation_dtype(dy.dtype)
    return grad_activate_from_y(dy.to(wide), y.to(wide), act)


def _from_z(
    dy: Tensor, x: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None, act_weight: Tensor | None, static: _Static
) -> tuple[Tensor, Tensor | None]:
    """(dz, gradient of act_weight) by ATen, in the accumulation type."""
    act, number, residual_scale, _ = static
    z = _pre_activation(x, residual, scale, shift, number, residual_scale, True)
    if z is x and act.name in ("sigmoid", "tanh"):  # whose gradient is written over z
        z = x.clone()
    dz, dweight = grad_activate_(dy.to(z.dtype), z, act, act_weight)
    if dweight is None or act_weight is None:
        return dz, None
    summed = dweight.sum([d for d in range(x.dim()) if d != 1]) if act_weight.numel() > 1 else dweight.sum()
    return dz, summed.reshape(act_weight.shape).to(act_weight.dtype)


def _differentiable_backward(
    ctx: Any, dy: Tensor, x: Tensor | None, z_source: Tensor | None, scale: Tensor | None, shift: Tensor | None, act_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward by operations that have a backward; where y tells the slope, y's own history carries the second derivative."""
    act, number, residual_scale, _ = ctx.static
    needs = ctx.needs_input_grad
    after = _channel_sum(dy, ctx.like[2]) if needs[4] else None
    wide, given = dy.to(accumulation_dtype(dy.dtype)), dy.dtype
    if ctx.source == "y" or act.name == "identity":
        dz = wide if ctx.source is None else grad_activate_from_y(wide, z_source, act)  # type: ignore[arg-type]
        dx = (dz * _over_channels(scale, dz) if scale is not None else dz * number).to(given) if needs[0] else None
        dscale = None
        if needs[2]:
            assert x is not None
            dscale = _summed((dz * x).flatten(2).sum(2) if x.dim() > 2 else dz * x, ctx.like[0])
        dresidual = (dz * residual_scale).to(given) if needs[1] else None
        return dx, dresidual, dscale, _channel_sum(dz, ctx.like[1]) if needs[3] else None, after, None, None
    with torch.enable_grad():
        leaves = [ops.own_node(t, True) for t in (x, z_source, scale, shift, act_weight)]
        xl, rl, al, bl, wl = leaves
        assert xl is not None
        y = _compose(xl, rl, al, bl, None, wl, (act, number, residual_scale))
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy, create_graph=True, allow_unused=True))
    dx, dresidual, dscale, dshift, dweight = (None if t is None else next(found) for t in leaves)
    return dx, dresidual, dscale, dshift, after, dweight, None
