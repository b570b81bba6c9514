"""Weight norm and spectral norm of many weights by ATen's kernels, one weight after the other (normfused/backends/weights.py).

A weight norm along the first or last dimension is ATen's own kernel, one operator. A spectral norm takes two products with a vector an
iteration where torch's takes three (after an iteration sigma is the norm of W'u), and its backward four operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import accumulation_dtype
from ..reference import weights as formulas
from ..weights import View

__all__ = ["spectral_norm", "spectral_norm_backward", "weight_norm", "weight_norm_backward"]


def _has_kernel(view: View, v: Tensor) -> bool:
    return view.dim is not None and v.dim() > 1 and view.dim in (0, v.dim() - 1) and v.is_contiguous()


def weight_norm(views: Sequence[View], gs: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    weights, norms = [], []
    for view, g, v in zip(views, gs, vs, strict=True):
        if _has_kernel(view, v):
            weight, norm = torch.ops.aten._weight_norm_interface(v, g, view.dim)
        else:
            weight, norm = formulas.weight_norm(g, v, view.dim), g.new_empty(0)
        weights.append(weight)
        norms.append(norm)
    return weights, tuple(norms)


def weight_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], gs: Sequence[Tensor], vs: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dgs: list[Tensor | None] = []
    dvs: list[Tensor | None] = []
    for view, dw, g, v, norm in zip(views, dweights, gs, vs, saved, strict=True):
        dg = dv = None
        if dw is not None and _has_kernel(view, v):
            dv, dg = torch.ops.aten._weight_norm_interface_backward(dw, v, g, norm, view.dim)
        elif dw is not None:
            dg, dv = formulas.weight_norm_backward(dw, g, v, view.dim)
        dgs.append(dg)
        dvs.append(dv)
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
