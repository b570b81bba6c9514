"""Weight norm and spectral norm of many weights by ATen's kernels, one weight after the other (normfused/backends/weights.py).

A weight norm whose rows lie one after the other in memory, or whose columns do, is ATen's own operator with its own node in the graph
(`weight_norm_by_operator`). A spectral norm takes two products with a vector an iteration where torch's takes three (after an iteration
sigma is the norm of W'u), and its backward four operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...problem import accumulation_dtype
from ..reference import weights as formulas
from ..weights import View

__all__ = [
    "spectral_norm",
    "spectral_norm_backward",
    "weight_norm",
    "weight_norm_backward",
    "weight_norm_by_operator",
    "weight_norm_of_rows",
]


def weight_norm_by_operator(g: Tensor, v: Tensor, dim: int) -> Tensor:
    """The normalised weight of a contiguous v whose rows are counted along its first or last dimension, differentiable twice.

    The gradient of the gradient of ATen's node is wrong (it fails gradgradcheck in torch 2.11 and 2.13): where a graph of the backward is
    built, a hook puts the formulas' gradients in place of the node's. A hook costs a tenth of an autograd Function.
    """
    weight = torch._weight_norm(v, g, dim)
    node = weight.grad_fn
    if node is not None:
        node.register_hook(partial(_differentiable, g, v, dim))
    return weight


def weight_norm_of_rows(view: View, g: Tensor, v: Tensor) -> Tensor | None:
    """The same of any dense v, seen in its order of memory; None where rows are neither outermost nor innermost."""
    if view.dim == 0 and v.dim() > 1 and v.is_contiguous():
        return weight_norm_by_operator(g, v, 0)
    if (view.A != 1 and view.B != 1) or (v.dim() == 1 and view.dim is not None):
        return None
    if view.R == 1 and v.is_cuda:
        return None  # a row is one block's there
    if view.dim is None:
        weight = weight_norm_of_rows(view._replace(dim=0), g.view([1] * (v.dim() + 1)), v.unsqueeze(0))
        return None if weight is None else weight.squeeze(0)
    rest = sorted((d for d in range(v.dim()) if d != view.dim), key=v.stride, reverse=True)
    order = [view.dim, *rest] if view.A == 1 else [*rest, view.dim]
    weight = weight_norm_by_operator(g.permute(order), v.permute(order), order.index(view.dim))
    return weight.permute([order.index(d) for d in range(v.dim())])


def _differentiable(
    g: Tensor, v: Tensor, dim: int, gradients: tuple[Tensor | None, ...], upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Hook of ATen's node: where a graph of the backward is built, (dv, dg) that know theirs."""
    dw = upstream[0]
    if dw is None or not torch.is_grad_enabled():
        return None
    dg, dv = formulas.weight_norm_backward(dw, g, v, dim)
    return tuple(None if theirs is None else ours for theirs, ours in zip(gradients, (dv, dg), strict=True))


def weight_norm(views: Sequence[View], gs: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    weights, norms = [], []
    for view, g, v in zip(views, gs, vs, strict=True):
        wide = v.to(accumulation_dtype(v.dtype))
        norm = formulas.norm(wide, view.dim)
        weights.append((wide * (g / norm)).to(v.dtype))
        norms.append(norm)
    return weights, tuple(norms)


def weight_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], gs: Sequence[Tensor], vs: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dgs: list[Tensor | None] = []
    dvs: list[Tensor | None] = []
    for view, dw, g, v, norm in zip(views, dweights, gs, vs, saved, strict=True):
        if dw is None:
            dgs.append(None)
            dvs.append(None)
            continue
        across = [d for d in range(v.dim()) if d != view.dim]
        wide_dw, wide = dw.to(norm.dtype), v.to(norm.dtype)
        products = wide_dw * wide
        dg = (products.sum(across, keepdim=view.dim is not None) if across else products) / norm
        scale = g / norm
        dv = torch.mul(wide_dw, scale, out=products).addcmul_(wide, scale * (dg / norm), value=-1)
        dgs.append(dg.to(g.dtype))
        dvs.append(dv.to(v.dtype))
    return dgs, dvs


def spectral_norm(
    views: Sequence[View], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    normalised, used_us, used_vs, sigmas = [], [], [], []
    for view, weight, u, v in zip(views, weights, us, vs, strict=True):
        assert view.dim is not None
        matrix = formulas.matrix_of(weight, view.dim).to(accumulation_dtype(weight.dtype))
        used_v = v.to(matrix.dtype, copy=not iterations)
        used_u = u.to(matrix.dtype, copy=not iterations)
        if iterations:
            for _ in range(iterations):
                used_u = formulas.unit(torch.mv(matrix, used_v), eps)
                product = torch.mv(matrix.t(), used_u)
                length = torch.linalg.vector_norm(product)
                divisor = length.clamp_min(eps)
                used_v = product / divisor
            sigma = length * (length / divisor)  # u' W v = product' v
            u.copy_(used_u)
            v.copy_(used_v)
        else:
            sigma = torch.dot(used_u, torch.mv(matrix, used_v))
        normalised.append(weight / sigma)
        used_us.append(used_u)
        used_vs.append(used_v)
        sigmas.append(sigma)
    return normalised, (torch.cat(used_us), torch.cat(used_vs), torch.stack(sigmas))


def spectral_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], weights: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    us, vs, sigmas = saved
    found: list[Tensor | None] = []
    for view, dw, weight, u, v, sigma in zip(
        views, dweights, weights, us.split([w.R for w in views]), vs.split([w.columns for w in views]), sigmas.unbind(), strict=True
    ):
        if dw is None:
            found.append(None)
            continue
        assert view.dim is not None
        wide_dw, wide = dw.to(u.dtype), weight.to(u.dtype)
        # flat in the order of memory, which both have
        product = torch.dot(_flat(wide_dw), _flat(wide)) / sigma
        gradient = wide_dw / sigma
        by_rows = gradient.movedim(view.dim, 0)
        column = (u * (-product / sigma)).view(-1, *([1] * (by_rows.dim() - 1)))
        by_rows.addcmul_(column, v.view(1, *by_rows.shape[1:]))
        found.append(gradient.to(weight.dtype))
    return found


def _flat(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
