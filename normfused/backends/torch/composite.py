"""A whole norm as differentiable ATen operations: what CPU tensors get where ATen's kernels are accurate, and what every
backend uses where autograd must see through it (double backward, forward mode, functorch, torch.compile, export).

Half types are computed in float32 and rounded once, like the kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import compiling, rules
from ...activations import Activation, activate
from ...problem import (
    CHANNEL,
    MEAN_ONLY,
    NCHW,
    NHWC,
    POSITION,
    POST_ACT,
    PRE_ACT,
    PRE_NORM,
    RMS,
    SAMPLE_GROUP,
    accumulation_dtype,
    dense,
    format_of,
    layout_of,
)


def _widen(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _broadcast(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(1, -1, *[1] * (x.dim() - 2))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight*x + bias per channel."""
    if weight is not None and bias is not None:
        return torch.addcmul(_broadcast(bias, x), x, _broadcast(weight, x))
    if weight is not None:
        return x * _broadcast(weight, x)
    return x if bias is None else x + _broadcast(bias, x)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Training-mode batch norm in x's type; running statistics may be of another type and keep it."""
    if counter is not None:
        counter.add_(1)
    if (running_mean is None and running_var is None) or x.numel() == 0:
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    # torch saves the buffers it is given for the backward, and ours may be rewritten before it (DDP broadcasts them): it gets copies.
    if momentum is not None and running_mean is not None and running_var is not None and running_mean.dtype == running_var.dtype == x.dtype:
        mean, var = running_mean.clone(), running_var.clone()
        y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled)
        running_mean.copy_(mean)
        running_var.copy_(var)
        return y
    # With momentum 1 the copies become this batch's statistics, so that the counter need not be read on the host
    mean, var = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    update_running(running_mean, running_var, mean, var, counter, momentum)
    return y


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, counter: Tensor | None, momentum: float | None
) -> None:
    """running <- (1-m)*running + m*value in value's type, rounded once; the counter is read on its device."""
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        factor = 1.0 if counter is None else counter.to(mean.dtype).reciprocal()
    for running, value in ((running_mean, mean), (running_var, var)):
        if running is None:
            continue
        if running.dtype == value.dtype:
            running.lerp_(value, factor)
        else:
            running.copy_(torch.lerp(running.to(value.dtype), value, factor))


def frozen(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """The norm with given moments per channel."""
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return affine(x, scale, shift)


def renormed(saved: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias with which the standard rule gives Batch Renorm of the (scale, r, d) that a backend saved, constants here."""
    _, r, d = saved
    if weight is None:
        return r, d if bias is None else d + bias
    return weight * r, weight * d if bias is None else torch.addcmul(bias.to(d.dtype), weight.to(d.dtype), d)


def batch_instance(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, given: tuple[Tensor, Tensor] | None, eps: float
) -> Tensor:
    """Batch-instance norm; ``given``: mean and rstd per channel, None for those of the batch."""
    positions = list(range(2, x.dim()))
    centre = x.mean(positions, keepdim=True)
    var = (x - centre).square().mean(positions, keepdim=True)
    scale, offset = rules.batch_instance(centre.flatten(1), var.flatten(1), gate, weight, bias, *(given or ()), eps=eps)
    return torch.addcmul(offset.view_as(centre), x - centre, scale.view_as(centre))


def mean_only(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight*(x - mean) + bias."""
    across = [d for d in range(x.dim()) if d != 1]
    mean = x.sum(across, keepdim=True) / (x.numel() // x.shape[1])  # the sum's gradient is a view, the mean's a tensor of x's size
    if weight is None:
        return x + (-mean if bias is None else _broadcast(bias, x) - mean)
    return affine(x - mean, weight, bias)


_CENTRE_STRIDE = 8  # so that at worst three bits of the variance are lost


def grouped(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group norm that keeps channels_last.

    ATen's CPU kernel for channels_last takes E[x^2] - E[x]^2 and loses everything at a large mean, so it is given x less a centre of each
    set; the norm is the same, and so are its derivatives with that centre held constant. The mean over a fraction f of a set will do as
    centre, whatever its values: if the two parts' means are far apart, so are the values, and (mean - centre)^2 <= (1/f - 1)*variance.
    Inductor has centred sums of its own.
    """
    if weight is None and bias is not None:  # ATen's backward of a bias alone fails: "tensor does not have a device"
        return affine(grouped(x, groups, None, None, eps), None, bias)
    if format_of(x) != NHWC or (torch.compiler.is_compiling() and not compiling.exporting()):
        return torch.group_norm(x, groups, weight, bias, eps, torch.backends.cudnn.enabled)
    centre = x.detach()[:, :, ::_CENTRE_STRIDE].mean(list(range(2, x.dim())), keepdim=True)
    if groups != x.shape[1]:
        sets = centre.unflatten(1, (groups, -1))
        centre = sets.mean(2, keepdim=True).expand_as(sets).flatten(1, 2)
    return torch.group_norm(x - centre, groups, weight, bias, eps, torch.backends.cudnn.enabled)


class _OneElement(torch.autograd.Function):
    """x/sqrt(x^2 + eps) with its derivative eps/(x^2 + eps)^(3/2) written out; autograd's own form of it cancels to nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: Tensor) -> Tensor:
        return x * (x * x + eps).rsqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, eps = ctx.saved_tensors
        cubed = (x * x + eps) ** -1.5
        deps = (-0.5 * dy * x * cubed).sum_to_size(eps.shape) if ctx.needs_input_grad[1] else None
        return dy * eps * cubed, deps


class _OneElementForward(_OneElement):
    """The same with forward-mode AD, which Dynamo does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, eps_t: Tensor | None) -> Tensor:
        x, eps = ctx.saved_tensors
        cubed = (x * x + eps) ** -1.5
        tangent: Tensor = x_t * eps * cubed
        return tangent if eps_t is None else tangent - 0.5 * x * cubed * eps_t


def mean_square(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rule_weight: Tensor | None) -> Tensor:
    """Filter response norm: no mean, the mean square over the positions of each (n, c)."""
    effective = eps if rule_weight is None else eps + _broadcast(rule_weight.abs(), x)
    if math.prod(x.shape[2:]) == 1:
        one_element = _OneElement if torch.compiler.is_compiling() else _OneElementForward
        normalized: Tensor = one_element.apply(x, torch.as_tensor(effective, dtype=x.dtype, device=x.device))  # type: ignore[no-untyped-call]
        return affine(normalized, weight, bias)
    second = (x * x).mean(list(range(2, x.dim())), keepdim=True)
    return affine(x * (second + effective).rsqrt(), weight, bias)


def over_channels(x: Tensor, rule: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer or RMS norm over dim 1, keeping the memory format."""
    if x.dim() == 2:
        return trailing(x, rule, (x.shape[1],), weight, bias, eps)
    y = trailing(x.movedim(1, -1), rule, (x.shape[1],), weight, bias, eps).movedim(-1, 1)
    return y if format_of(x) == NHWC else y.contiguous()


def trailing(x: Tensor, rule: str, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer or RMS norm over the trailing dimensions ``shape``."""
    if rule == RMS:
        y = torch.rms_norm(x, shape, weight, eps)
        return y if bias is None else y + bias
    return torch.layer_norm(x, shape, weight, bias, eps, torch.backends.cudnn.enabled)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
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
    normalized_shape: Sequence[int] | None,
) -> Tensor:
    """z, the norm without residual and activation, in x's type (not a half type)."""
    if not batch_statistics:
        if running_mean is None or running_var is None:
            if weight is None:
                return affine(x, None, bias)
            # not `affine`: of this ATen has the gradients in two passes
            running_mean, running_var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    if rule == MEAN_ONLY:
        return mean_only(x, weight, bias)
    if scope == CHANNEL:
        return batch_norm(x, weight, bias, running_mean, running_var, counter, momentum, eps)
    if scope == SAMPLE_GROUP:
        if running_mean is not None or running_var is not None:
            _track_instances(x, running_mean, running_var, counter, momentum)
        if rule == RMS:
            return mean_square(x, weight, bias, eps, rule_weight)
        return grouped(x, groups, weight, bias, eps)
    if normalized_shape is not None:
        return trailing(x, rule, normalized_shape, weight, bias, eps)
    return over_channels(x, rule, weight, bias, eps)


def _track_instances(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None, momentum: float | None
) -> None:
    if counter is not None:
        counter.add_(1)
    with torch.no_grad():
        flat = x.detach().flatten(2)
        var, mean = torch.var_mean(flat, 2, correction=1)
        update_running(running_mean, running_var, mean.mean(0), var.mean(0), counter, momentum)


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
    eager: bool = False,
    normalized_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, h) with h = x + residual in pre_norm mode, else None. ``eager``: nobody traces or transforms the call, so z's memory is
    reused where autograd allows it, and a gradient that arrives in another memory format is brought into x's.

    With ``normalized_shape`` x has any shape that ends in it (scope position) and the parameters have it.
    """
    storage, wide = x.dtype, accumulation_dtype(x.dtype)
    h = None
    if residual_mode == PRE_NORM:
        assert residual is not None
        x = h = x + residual
    layout = format_of(x) if normalized_shape is None else None
    wide_x: Tensor = _widen(x, wide)  # type: ignore[assignment]
    if layout is not None and ((scope == POSITION and layout == NCHW) or layout_of(x) is None):
        wide_x = format_gradient(wide_x, layout, eager, own=False)  # ATen's comes as it suits its rows, or as it guesses
    if layout == NHWC and 1 in x.shape and layout_of(x) == NHWC:
        wide_x = _canonical(wide_x)
    unlike_aten = scope != POSITION and x.dim() == 3 and layout == NHWC  # which knows channels_last of four and five dimensions
    z = normalize(
        wide_x.unsqueeze(2) if unlike_aten else wide_x,
        _widen(weight, wide),
        _widen(bias, wide),
        _widen(rule_weight, wide),
        running_mean,
        running_var,
        counter,
        scope,
        rule,
        groups,
        batch_statistics,
        eps,
        momentum,
        normalized_shape,
    )
    z = z.squeeze(2) if unlike_aten else z
    if layout is not None:
        z = dense(z, layout)
    # z may be x itself or a view of it where a norm has nothing to do; only fresh memory is written over. A view of fresh memory is
    # not either: autograd would copy around the write.
    inplace = eager and z.data_ptr() != x.data_ptr() and not z._is_view()
    if residual_mode == PRE_ACT:
        assert residual is not None
        z = z.add_(residual) if inplace else z + residual
    if layout is not None:
        z = format_gradient(z, layout, eager)
    y = activate(z, act, act_weight, inplace=inplace)
    if residual_mode == POST_ACT:
        assert residual is not None
        y = y + residual
    return (y if y.dtype == storage else y.to(storage)), h


def _canonical(x: Tensor) -> Tensor:
    """x, dense in nhwc, with the strides that ATen knows channels_last by also in dimensions of one element."""
    pixels = x.movedim(1, -1)
    return pixels.view(pixels.shape).movedim(-1, 1)


class _FormatGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layout: str) -> Tensor:
        return x.clone()  # a view could not be written over by whoever gets it; a compiler leaves the copy out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return dense(gradient, ctx.layout), None


def format_gradient(t: Tensor, layout: str, eager: bool, own: bool = True) -> Tensor:
    """t, whose gradient will be dense in ``layout`` (left to the operations where a transform sees through the norm).

    ``own``: t is not the caller's tensor, so that a hook may stay on it.
    """
    if not t.requires_grad:
        return t
    if eager:  # a hook costs a fraction of a Function
        t = t if own and not t.is_leaf else t.view_as(t)
        t.register_hook(_IN_FORMAT[layout])
    elif torch.compiler.is_compiling() and not compiling.exporting() and not torch._C._are_functorch_transforms_active():
        t = _FormatGradient.apply(t, layout)  # type: ignore[no-untyped-call]
    return t


def _in_format(layout: str) -> Callable[[Tensor | None], Tensor | None]:
    def hook(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else dense(gradient, layout)  # None: a second derivative that does not depend on t

    hook.__torch_unserializable__ = True  # type: ignore[attr-defined] # saving y need not warn of it
    return hook


_IN_FORMAT = {layout: _in_format(layout) for layout in (NCHW, NHWC)}


def activate_add(z: Tensor, residual: Tensor | None, act: Activation, act_weight: Tensor | None, residual_mode: str | None) -> Tensor:
    """act(z [+ residual]) [+ residual]: the epilogue alone."""
    if residual_mode == PRE_ACT:
        assert residual is not None
        z = z + residual
    y = activate(z, act, act_weight)
    if residual_mode == POST_ACT:
        assert residual is not None
        y = y + residual
    return y
