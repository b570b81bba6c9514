"""Step 3, backward: dx = dz_scale*dz + q*(x - centre) + r [+ dh]."""

from __future__ import annotations

from torch import Tensor

from ...problem import Problem
from .views import like, ncs


def grad_apply(
    p: Problem,
    dz: Tensor,
    x: Tensor,
    centre: Tensor | float,
    dz_scale: Tensor | float,
    q: Tensor | float,
    r: Tensor | float,
    dh: Tensor | None = None,
) -> Tensor:
    centred = ncs(p, x).to(p.accumulate) - centre
    dx = dz * dz_scale + q * centred + r
    return like(p, dx if dh is None else dx + ncs(p, dh).to(p.accumulate), x)
