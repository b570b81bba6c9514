"""Weight norm and spectral norm of many weights by csrc/kernels/weights.cuh: one launch for all, three for spectral norm.

A launch holds 54 weights; more take more launches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..weights import View, of_used
from . import _operators

__all__ = ["spectral_norm", "spectral_norm_backward", "weight_norm", "weight_norm_backward"]


def _numbers(views: Sequence[View]) -> list[int]:
    return [number for view in views for number in view[1:]]


def weight_norm(views: Sequence[View], gs: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    weights, norms = _operators().weight_norm(list(vs), list(gs), _numbers(views))
    return weights, (norms,)


def weight_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], gs: Sequence[Tensor], vs: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dgs: list[Tensor | None] = [None] * len(views)
    dvs: list[Tensor | None] = [None] * len(views)
    used = [i for i, dw in enumerate(dweights) if dw is not None]
    if used:
        found_dgs, found_dvs = _operators().weight_norm_backward(
            [dweights[i] for i in used],
            [vs[i] for i in used],
            [gs[i] for i in used],
            of_used(saved[0], [view.R for view in views], used),
            _numbers([views[i] for i in used]),
        )
        for i, dg, dv in zip(used, found_dgs, found_dvs, strict=True):
            dgs[i], dvs[i] = dg, dv
    return dgs, dvs


def spectral_norm(
    views: Sequence[View], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    normalised, u, v, sigma = _operators().spectral_norm(list(weights), list(us), list(vs), _numbers(views), iterations, eps)
    return normalised, (u, v, sigma)


def spectral_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], weights: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    u, v, sigma = saved
    gradients: list[Tensor | None] = [None] * len(views)
    used = [i for i, dw in enumerate(dweights) if dw is not None]
    if used:
        found = _operators().spectral_norm_backward(
            [dweights[i] for i in used],
            [weights[i] for i in used],
            of_used(u, [view.R for view in views], used),
            of_used(v, [view.columns for view in views], used),
            of_used(sigma, [1] * len(views), used),
            _numbers([views[i] for i in used]),
        )
        for i, gradient in zip(used, found, strict=True):
            gradients[i] = gradient
    return gradients
