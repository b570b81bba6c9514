"""The formulas of weight norm and spectral norm in plain, differentiable PyTorch: of one weight, for what must see through them.

    weight norm      w = g * v/|v|                     dg = <dw, v>/|v|        dv = g/|v| * dw - g*dg/|v|^2 * v
    spectral norm    w = W/sigma, sigma = u' W v       dW = (dw - <dw, w> * u v')/sigma

<,> and || go over a row of weight norm, over all of the weight in spectral norm, where u and v are constants. Everything is computed in
float32 or better and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import accumulation_dtype


def _rows(v: Tensor, dim: int | None) -> list[int]:
    return [d for d in range(v.dim()) if d != dim]


def norm(v: Tensor, dim: int | None) -> Tensor:
    """Shape of g: 1 in all dimensions but dim; () without dim."""
    across = _rows(v, dim)
    if not across:  # vector_norm takes an empty list for all dimensions
        return v.abs()
    length: Tensor = torch.linalg.vector_norm(v, dim=across, keepdim=dim is not None)
    return length


def weight_norm(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    wide = v.to(accumulation_dtype(v.dtype))
    return (wide * (g.to(wide.dtype) / norm(wide, dim))).to(v.dtype)


def weight_norm_backward(dw: Tensor, g: Tensor, v: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    accumulate = accumulation_dtype(v.dtype)
    wide_dw, wide_g, wide = dw.to(accumulate), g.to(accumulate), v.to(accumulate)
    length, across = norm(wide, dim), _rows(v, dim)
    products = wide_dw * wide
    dg = (products.sum(across, keepdim=dim is not None) if across else products) / length
    dv = wide_g / length * wide_dw - wide_g * dg / length.square() * wide
    return dg.to(g.dtype), dv.to(v.dtype)


def matrix_of(weight: Tensor, dim: int) -> Tensor:
    """(rows along dim, columns in the order of the other sizes)."""
    return weight.movedim(dim, 0).flatten(1)


def unit(vector: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp_min(eps)


@torch.no_grad()
def iterate(matrix: Tensor, v: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """u, v after so many steps of the power method, which begin with v."""
    for _ in range(iterations):
        u = unit(torch.mv(matrix, v), eps)
        v = unit(torch.mv(matrix.t(), u), eps)
    return u, v


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float, dim: int) -> Tensor:
    """``u`` and ``v`` are updated in place where there are iterations."""
    accumulate = accumulation_dtype(weight.dtype)
    wide = weight.to(accumulate)
    matrix = matrix_of(wide, dim)
    if iterations:
        wide_u, wide_v = iterate(matrix.detach(), v.to(accumulate), iterations, eps)
        with torch.no_grad():
            u.copy_(wide_u)
            v.copy_(wide_v)
    else:  # copies, which a later forward does not overwrite
        wide_u, wide_v = u.to(accumulate, copy=True), v.to(accumulate, copy=True)
    return (wide / torch.dot(wide_u, torch.mv(matrix, wide_v))).to(weight.dtype)


def spectral_norm_backward(dw: Tensor, weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """``u`` and ``v``: those that the forward used, in the type of accumulation."""
    wide_dw, wide = dw.to(u.dtype), weight.to(u.dtype)
    sigma = torch.dot(u, torch.mv(matrix_of(wide, dim), v))
    product = (wide_dw * wide).sum() / sigma
    outer = torch.outer(u, v).view(wide.movedim(dim, 0).shape).movedim(0, dim)
    return ((wide_dw - product * outer) / sigma).to(weight.dtype)
