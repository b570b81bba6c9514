"""Batch norm over the processes of a group: what they exchange, how it is merged, and autograd.

Forward, every process reads x once for its own moments per channel; one all-gather of 2C + 1 numbers (count, mean, sum of centred
squares) gives all of them everyone's, and all merge them by Chan's formula for unequal counts in the order of the ranks, so that all
have the same bits. Then x is read again: y = act(scale*x + shift). Backward, one all-gather of 2C numbers, summed in the same order,
between two passes over (dy, x). An empty batch takes part with zeros. Counts stay on the device: nothing waits for it.

The gradient is that of the sum of all processes' losses. Parameters' gradients are this process's share: summing (or, as DDP does,
averaging) them over the processes is left to who trains, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from . import dispatch, ops, rebuild
from .activations import Activation
from .backends.torch import composite
from .problem import CHANNEL, NHWC, PRE_ACT, STANDARD, accumulation_dtype, dense, layout_of

__all__ = ["Group", "group_of", "norm_act"]


@dataclass(frozen=True)
class Group:
    """A process group in what an operator's schema can hold, and this process's place in it."""

    name: str
    size: int
    rank: int


def group_of(process_group: Any) -> Group | None:
    """The group (None: all processes), or None where there is nobody else to ask.

    Raises:
        ValueError: this process is not in the group.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    size = distributed.get_world_size(process_group)
    if size < 1:
        raise ValueError(f"process_group: this process must be a member, got a group without rank {distributed.get_rank()}")
    if size == 1:
        return None
    group: Any = distributed.group.WORLD if process_group is None else process_group
    return Group(group.group_name, size, distributed.get_rank(process_group))


def gather(numbers: Tensor, group: Group) -> Tensor:
    """(size, K): the (K,) numbers of every process, by rank."""
    everyone = torch.ops._c10d_functional.all_gather_into_tensor(numbers.contiguous(), group.size, group.name)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(everyone)
    return found.view(group.size, -1)


class Gather(torch.autograd.Function):
    """`gather`, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(numbers, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return SumOwn.apply(upstream, ctx.group), None  # type: ignore[no-untyped-call]


class SumOwn(torch.autograd.Function):
    """The transpose: of everyone's (size, K), the sum over the processes of this one's row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(rows.reshape(-1), group).view(group.size, group.size, -1)[:, group.rank].sum(0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(upstream, ctx.group), None  # type: ignore[no-untyped-call]


def merge(count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Chan's formula for K parts with counts (K, 1), means and sums of centred squares (K, C): the same of the whole, (1,), (C,), (C,).

    .. math:: n = \sum n_i,\quad \mu = \sum n_i \mu_i / n,\quad M = \sum M_i + \sum n_i (\mu_i - \mu)^2

    The means are taken relative to that of the largest part, so that equal ones stay exact; a part of count 0 counts for nothing.
    Chan, Golub & LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1979.
    """
    total = count.sum(0)
    anchor = mean.index_select(0, count.argmax(0)).detach()
    deviation = mean - anchor
    offset = (count * deviation).sum(0) / total.clamp(min=1)
    return total, anchor.squeeze(0) + offset, squares.sum(0) + (count * (deviation - offset).square()).sum(0)


def _merged(everyone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, biased variance) from the gathered (size, 1 + 2C)."""
    channels = everyone.shape[1] // 2
    count, mean, squares = everyone.split([1, channels, channels], 1)
    total, mean, squares = merge(count, mean, squares)
    return total, mean, squares / total.clamp(min=1)


def _own_numbers(x: Tensor, backend: str) -> Tensor:
    """(count, mean, sum of centred squares) of this process, (1 + 2C,)."""
    n, channels = x.shape[:2]
    if x.numel() == 0:
        return x.new_zeros(1 + 2 * channels, dtype=accumulation_dtype(x.dtype))
    mean, var = ops.moments(x, backend)
    positions = x.numel() // (n * channels)
    count = mean.new_full((n, 1), positions)
    return torch.cat(merge(count, mean, var * positions))


class SyncNormAct(torch.autograd.Function):
    """Saves x, the group's moments per channel, the parameters and, with a residual before the activation, y or the residual.

    With ``keeps_y`` it saves y in place of x, which it rebuilds (`rebuild`).
    """

    @staticmethod
    def forward(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
        eps: float, act: str, p0: float, p1: float, residual_mode: str | None, backend: str, group: tuple[str, int, int], keeps_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        count, mean, var = _merged(gather(_own_numbers(x, backend), Group(*group)))
        if x.numel() == 0:
            return _empty_after(mean, x), count, mean, var
        scale, shift = _coefficients(x, mean, (var + eps).rsqrt(), weight, bias)
        y, _ = ops.apply(x, residual, scale, shift, act_weight, act, p0, p1, residual_mode, backend)
        return y, count, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, act_weight, eps, act, p0, p1, residual_mode, backend, group, keeps_y = inputs
        y, count, mean, var = output
        ctx.eps, ctx.static, ctx.group, ctx.keeps_y = eps, (act, p0, p1, residual_mode, backend), group, keeps_y
        source = ops.step_z_source(Activation(act, p0, p1), x.dtype, residual_mode, backend)
        z_source = {None: None, "y": y, "residual": residual}[source]
        ctx.mark_non_differentiable(count, mean, var)
        ctx.save_for_backward(y if keeps_y else x, z_source, weight, bias, act_weight, count, mean, var)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, z_source, weight, bias, act_weight, count, mean, var = ctx.saved_tensors
        needs, static, group = ctx.needs_input_grad, ctx.static, Group(*ctx.group)
        residual_mode = static[3]
        none = (None,) * 8
        if ctx.keeps_y:
            rebuild.check_once()
            dy, z = rebuild.before_activation(dy, x, Activation(*static[:3]))
            x = rebuild.centred_input(z, weight, bias, (var + ctx.eps).rsqrt(), CHANNEL)
            mean, static = torch.zeros_like(mean), ("identity", 0.0, 0.0, *static[3:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_differentiable_backward(dy, x, z_source, weight, bias, act_weight, ctx.eps, static, group, needs), *none)
        channels = x.shape[1]
        dact_weight = None
        if x.numel() == 0:
            # zero, but known only in the backward: a compiler would exchange a constant in the forward
            sum_dz = sum_dz_xc = torch.zeros_like(mean) + dy.sum(dtype=mean.dtype)
            rstd = mean
            if act_weight is not None:
                dact_weight = torch.zeros_like(act_weight)
        else:
            rstd = (var + ctx.eps).rsqrt()
            centre = mean.expand(x.shape[0], channels).contiguous()
            scale, shift = _coefficients(x, mean, rstd, weight, bias)
            slices = ops.grad_moments(dy, x, z_source, centre, scale, shift, act_weight, *static)
            sum_dz, sum_dz_xc = slices[0].sum(0), slices[1].sum(0)
            dact_weight = None if act_weight is None else slices[2]
        own_residual = residual_mode == PRE_ACT and needs[1] and static[0] != "identity"
        dx, dresidual = None, (dy if residual_mode is not None and not own_residual else None)
        q = r = all_dz = torch.zeros_like(mean)
        if needs[0]:
            all_dz, all_dz_xc = gather(torch.cat((sum_dz, sum_dz_xc)), group).sum(0).split([channels, channels])
            slope = rstd if weight is None else rstd * weight
            q, r = -slope * rstd.square() * all_dz_xc / count.clamp(min=1), -slope * all_dz / count.clamp(min=1)
        if x.numel() == 0:
            dx = _empty_after(all_dz, x)
            dresidual = dx if own_residual else dresidual
        elif needs[0] or own_residual:
            q, r = (t.expand_as(scale).contiguous() for t in (q, r))
            dx, dz = ops.grad_apply(dy, x, z_source, centre, scale, shift, act_weight, scale, q, r, *static, needs[0], own_residual)
            dx, dresidual = dx if needs[0] else None, dz if own_residual else dresidual
        dweight = None if weight is None else (rstd * sum_dz_xc).to(weight.dtype)
        return (dx, dresidual, dweight, None if bias is None else sum_dz.to(bias.dtype), dact_weight, *none)


def _empty_after(numbers: Tensor, x: Tensor) -> Tensor:
    """An empty tensor like x that depends on ``numbers``: a compiler must not drop the exchange they come from."""
    return torch.empty_like(x) + numbers[0].to(x.dtype)


def _coefficients(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, shift), (N, C)."""
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
    shape = (x.shape[0], x.shape[1])
    return scale.expand(shape).contiguous(), shift.expand(shape).contiguous()


def _composite(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    eps: float, act: Activation, residual_mode: str | None, group: Group,
) -> Tensor:  # fmt: skip
    """The same in differentiable operations."""
    wide = x.to(accumulation_dtype(x.dtype))
    dims = [0, *range(2, x.dim())]
    own = max(x.numel() // x.shape[1], 1)
    mean = wide.sum(dims) / own
    squares = (wide - mean.view(1, -1, *[1] * (x.dim() - 2))).square().sum(dims)
    count = wide.new_full((1,), x.numel() // x.shape[1])
    everyone: Tensor = Gather.apply(torch.cat((count, mean, squares)), group)  # type: ignore[no-untyped-call]
    _, mean, var = _merged(everyone)
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    z = composite.frozen(wide, weight, bias, mean, (var + eps).rsqrt())
    return composite.activate_add(z, residual, act, act_weight, residual_mode).to(x.dtype)


def _differentiable_backward(
    dy: Tensor, x: Tensor, z_source: Tensor | None, weight: Tensor | None, bias: Tensor | None, act_weight: Tensor | None,
    eps: float, static: tuple[Any, ...], group: Group, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The vector-Jacobian product of the composite, recomputed; all processes of the group must come here together."""
    act, upstream, dresidual, mode = ops.epilogue_to_redo(dy, z_source, x.dtype, static)
    inputs = [x, z_source if mode else None, weight, bias, act_weight]
    with torch.enable_grad():
        leaves = [ops.own_node(t, True) for t in inputs]
        xl, rl, wl, bl, al = leaves
        assert xl is not None
        y = _composite(xl, rl, wl, bl, al, eps, act, mode, group)
        wanted = [t for t, need in zip(leaves, needs, strict=False) if t is not None and need]
        found = iter(torch.autograd.grad(y, wanted, upstream, create_graph=True, allow_unused=True) if wanted else ())
    gradients = [next(found) if t is not None and need else None for t, need in zip(leaves, needs, strict=False)]
    if mode != PRE_ACT:
        gradients[1] = dresidual
    return tuple(gradients)


def _one_sample(x: Tensor) -> Tensor:
    """(N, C, *) with channels innermost as (1, C, N*S, 1), a view."""
    return x.movedim(1, -1).reshape(1, -1, 1, x.shape[1]).movedim(-1, 1)


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
    normalized_shape: None,
    *,
    group: Group,
    keeps_y: bool,
) -> tuple[Tensor, None]:
    """`ops.norm_act` for the batch of all processes of ``group`` (scope channel, rule standard, statistics of the batch)."""
    name = dispatch.choose(x.device.type, x.dtype, backend)
    if keeps_y:
        rebuild.check("sync_batch_norm_act", act, x.dtype, residual_mode)
    if ops.trace is not None:
        ops.trace.append((name, "synchronized", CHANNEL, STANDARD, act, residual_mode, None))
    shape, x = x.shape, dense(x)
    if residual is not None:
        residual = dense(residual, layout_of(x))
    # channels innermost: one sample of C sets, where N samples would have N*C
    folds = x.numel() > 0 and (x.numel() == shape[0] * shape[1] or layout_of(x) == NHWC)
    if folds:
        x = _one_sample(x)
        residual = None if residual is None else _one_sample(residual)
    y, count, mean, var = ops.apply_function(
        SyncNormAct, x, residual, weight, bias, act_weight, eps, act.name, act.p0, act.p1, residual_mode, name,
        (group.name, group.size, group.rank), keeps_y,
    )  # fmt: skip
    if folds:
        y = y.movedim(1, -1).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if counter is not None:
        counter.add_(1)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            # of one value or none there is no variance to track; how many there are, the host does not know
            known = count > 1
            mean = torch.where(known, mean, running_mean.to(mean.dtype))
            var = torch.where(known, var * (count / (count - 1)), running_var.to(var.dtype))
            composite.update_running(running_mean, running_var, mean, var, counter, momentum)
    return y, None
