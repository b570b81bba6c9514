r"""The norm that keeps y, not x (``memory_efficient=True``), where the activation can be inverted.

The next layer keeps y anyway, and whoever made x rarely needs it, so a convolution -> norm -> activation block keeps one tensor in place
of two. The backward rebuilds the centred input and hands it, with mean 0, to the same kernels as ever:

.. math:: x - \mu = \frac{\mathrm{act}^{-1}(y) - \beta}{\gamma\,\rho},\qquad \rho = 1/\sqrt{v + \epsilon}

That is one pass more over memory (y in, x - mean out) and a temporary tensor of x's size. y was rounded, relatively by u (2^-24 in float32,
2^-11 in float16, 2^-8 in bfloat16), so the normalized input comes back with an error of about u*(\|x_hat\| + \|beta/gamma\|): a weight
near 0 makes it worthless (`too_near_zero`). Idea: Rota Bulò, Porzi & Kontschieder, *In-Place Activated BatchNorm*, arXiv 1712.02616;
other than there x is not overwritten and the weight means what it meant, so checkpoints are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, ops
from .activations import Activation, grad_activate_from_y
from .backends.torch import composite
from .problem import CHANNEL, POSITION, PRE_NORM, RMS, SAMPLE_GROUP, accumulation_dtype, dense, layout_of

__all__ = ["check", "check_activation", "norm_act", "too_near_zero"]

# The largest error of the normalized input, in standard deviations, at which a channel still counts as rebuilt
_ERROR = 1 / 32


def check_activation(op: str, act: Activation, dtype: torch.dtype | None = None) -> None:
    """Raise unless z follows from y = act(z) to within the rounding of y.

    Of the strictly monotone ones, elu, sigmoid and tanh do not qualify: their inverse magnifies y's rounding by 1/act'(z), and where y
    is rounded to the asymptote (elu below -17 in float32 and -6 in bfloat16, tanh beyond 9 and 3.5) z is infinite. softplus tends to 0,
    where floating-point numbers are dense enough: its error is u*y/sigmoid(z) <= 1.4u*(1 + \\|z\\|), except in float16, whose smallest
    numbers end that at z = -10.
    """
    sound = act.name == "identity" or (act.name == "leaky_relu" and act.p0 > 0)
    if act.name == "softplus" and act.p0 > 0 and act.p1 >= 16:
        sound = dtype != torch.float16
    if not sound:
        raise ValueError(
            f"{op}: memory_efficient=True must find x from y, which identity, leaky_relu with negative_slope > 0 and (not in float16)"
            f" softplus allow, got {act}{'' if dtype is None else f' in {dtype}'.replace('torch.', '')}"
        )


def check(op: str, act: Activation, dtype: torch.dtype, residual_mode: str | None) -> None:
    """Raise a ValueError unless y alone tells x: the activation, and no residual between the norm and y."""
    check_activation(op, act, dtype)
    if residual_mode not in (None, PRE_NORM):
        raise ValueError(f"{op}: memory_efficient=True must find x from y alone, got a residual in mode {residual_mode!r}")


def check_once() -> None:
    """Raise in a backward that is to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "memory_efficient=True keeps no x to differentiate a second time, got a backward with create_graph=True; build the layer"
            " with memory_efficient=False"
        )


def too_near_zero(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Which channels' weight is so small that y, rounded to ``dtype``, tells their normalized input no better than to 1/32.

    (u*\\|bias\\| + s)/\\|weight\\| >= 1/32, with the unit roundoff u and half the smallest positive number s.
    """
    u = torch.finfo(dtype).eps / 2
    noise = u * torch.finfo(dtype).smallest_normal
    return weight.abs() * _ERROR <= (noise if bias is None else bias.abs() * u + noise)


def before_activation(dy: Tensor, y: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """(dz, z) of y = act(z), in y's type. The slope is taken from y: the rounding of a z that was rebuilt may change its sign."""
    if act.name == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, y, act.p0, True), F.leaky_relu(y, 1 / act.p0)
    if act.name == "softplus":
        wide = y.to(accumulation_dtype(y.dtype))
        scaled = wide * act.p0
        z = torch.where(scaled > act.p1, wide, wide + torch.log(-torch.expm1(-scaled)) / act.p0)
        return grad_activate_from_y(dy.to(wide.dtype), wide, act).to(y.dtype), z.to(y.dtype)
    return dy, y


def _over_elements(numbers: Tensor, x: Tensor, scope: str) -> Tensor:
    """A number a set, broadcasting against x (N, C, *)."""
    spatial = x.dim() - 2
    if scope == CHANNEL:
        return numbers.reshape(1, -1, *[1] * spatial)
    if scope == SAMPLE_GROUP:
        return numbers.repeat_interleave(x.shape[1] // numbers.shape[1], dim=1).view(*x.shape[:2], *[1] * spatial)
    return numbers.view(x.shape[0], 1, *x.shape[2:])


def centred_input(z: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, scope: str) -> Tensor:
    """x - mean (of the rms rule: x) in z's type and layout, rounded once: a*z + b, or, where rstd varies along positions, over it."""
    scale = (
        torch.ones((), dtype=rstd.dtype, device=z.device)
        if weight is None
        else _over_elements(weight.to(rstd.dtype).reciprocal(), z, CHANNEL)
    )
    shift = -scale * _over_elements(bias, z, CHANNEL) if bias is not None else torch.zeros_like(scale)
    deviation = _over_elements(rstd.reciprocal(), z, scope)
    into: dict[str, Any] = (
        {} if torch.compiler.is_compiling() else {"out": torch.empty_like(z)}
    )  # Dynamo knows no out= here, and fuses the rounding
    if scope == POSITION:
        x = torch.mul(torch.addcmul(shift, z, scale), deviation, **into)
    else:
        x = torch.addcmul(shift * deviation, z, scale * deviation, **into)
    return x.to(z.dtype)


def _rstd(x: Tensor, scope: str, rule: str, groups: int, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    if scope == SAMPLE_GROUP:
        wide = wide.unflatten(1, (groups, -1))
        dims = list(range(2, wide.dim()))
    else:
        dims = [d for d in range(x.dim()) if d != 1] if scope == CHANNEL else [1]
    var = wide.square().mean(dims) if rule == RMS else torch.var(wide, dims, correction=0)
    rstd = (var + eps).rsqrt()
    return rstd if scope == CHANNEL else rstd.reshape(x.shape[0], -1)


def _eager_torch(backend: str) -> bool:
    """ATen's own kernels, forward and, by autograd, backward; under a compiler the operators stand in."""
    return backend == "torch" and not torch.compiler.is_compiling()


class RebuildNormAct(torch.autograd.Function):
    """Saves y, the parameters and one number a set."""

    @staticmethod
    def forward(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None, static: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        scope, rule, groups, batch_statistics, eps, momentum, act, p0, p1, residual_mode, backend = static
        if not _eager_torch(backend):
            tensors = (x, residual, weight, bias, None, None, running_mean, running_var, counter)
            y, _, rstd, h = torch.ops.normfused.norm_act(*tensors, *static)
            return y, rstd, h if residual_mode == PRE_NORM else None
        if not batch_statistics:
            assert running_var is not None
            rstd = (running_var.to(accumulation_dtype(x.dtype)) + eps).rsqrt()
        else:
            rstd = _rstd(x if residual_mode != PRE_NORM or residual is None else x + residual, scope, rule, groups, eps)
        y, h = composite.norm_act(
            x, residual, weight, bias, None, None, running_mean, running_var, counter,
            scope, rule, groups, batch_statistics, eps, momentum, Activation(act, p0, p1), residual_mode,
        )  # fmt: skip
        return y, rstd, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, weight, bias, *_, static = inputs
        y, rstd, _ = output
        ctx.static = static
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(y, weight, bias, rstd)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, _, dh = upstream
        y, weight, bias, rstd = ctx.saved_tensors
        scope, rule, *_, act, p0, p1, residual_mode, backend = ctx.static
        none = (None,) * 4
        if dy is None:
            return (dh, dh if residual_mode == PRE_NORM else None, None, None, *none)
        check_once()
        if residual_mode != PRE_NORM:
            dh = None
        dz, z = before_activation(dy, y, Activation(act, p0, p1))
        x = centred_input(z, weight, bias, rstd, scope)
        static = (*ctx.static[:6], "identity", 0.0, 0.0, residual_mode, backend)
        mean = torch.zeros_like(rstd) if rule != RMS else rstd.new_empty(0)
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        call = (dz, dh, x, None, weight, bias, None, None, mean, rstd)
        if _eager_torch(backend):
            needs = (need_x or need_residual, False, need_weight, need_bias, False, False)
            dx, _, dweight, dbias = ops.differentiable_backward(*call, static, needs)[:4]
        else:
            wanted = need_x or need_residual, False, need_weight or need_bias
            dx, _, dweight, dbias = torch.ops.normfused.norm_act_backward(*call, *static, *wanted)[:4]
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *none,
        )


@ops.without_autocast
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
) -> tuple[Tensor, Tensor | None]:
    """`ops.norm_act` of a call that passed `check`, keeping y."""
    if ops.see_through() or x.device.type == "meta" or x.numel() == 0:  # nothing is kept, or somebody else decides what
        found: tuple[Tensor, Tensor | None] = ops.norm_act(
            x, residual, weight, bias, None, None, running_mean, running_var, counter,
            scope, rule, groups, batch_statistics, eps, momentum, act, residual_mode, backend, normalized_shape,
        )  # fmt: skip
        return found
    name = dispatch.choose(x.device.type, x.dtype, backend)
    if ops.trace is not None:
        ops.trace.append((name, "rebuilt", scope, rule, act, residual_mode, None))
    full = x.shape
    if normalized_shape is not None:
        rows = (-1, math.prod(normalized_shape))
        x, residual = x.reshape(rows), None if residual is None else residual.reshape(rows)
        weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    x = dense(x)
    residual = None if residual is None else dense(residual, layout_of(x))
    static = (scope, rule, groups, batch_statistics, eps, momentum, act.name, act.p0, act.p1, residual_mode, name)
    y, _, h = ops.apply_function(RebuildNormAct, x, residual, weight, bias, running_mean, running_var, counter, static)
    if residual_mode != PRE_NORM:
        return y.view(full), None
    return y.view(full), h.view(full)
