"""y = weight*x*rstd + bias, rstd = 1/sqrt(mean square + eps): the standard rule with "mean := 0" and r = 0.

A learned eps is eps + |eps_weight|, its gradient sign(eps_weight)*sum(-1/2 rstd^3 B). A set of one element loses all digits in
rstd*dz + q*x, so there dz_scale = weight*rstd^3*eps and q = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def effective_eps(eps_weight, EPS: tl.constexpr):
    return EPS + tl.abs(eps_weight)


@triton.jit
def coefficients_vjp(rstd, b, count):
    """q"""
    return -(rstd * rstd * rstd) * b / count


@triton.jit
def eps_gradient(sum_cubed, eps_weight):
    """``sum_cubed``: the sum of rstd^3*B."""
    sign = tl.where(eps_weight > 0, 1.0, tl.where(eps_weight < 0, -1.0, 0.0))
    return -0.5 * sign * sum_cubed
