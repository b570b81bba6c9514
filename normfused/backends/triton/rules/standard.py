"""y = weight*(x - mean)*rstd + bias: scale = weight*rstd, and with A, B the weighted sums over the set of M elements

dz_scale = weight*rstd      q = -rstd^3*B/M      r = -rstd*A/M
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal_deviation(var, eps):
    return tl.rsqrt(var + eps)


@triton.jit
def coefficients_vjp(rstd, a, b, count):
    """(q, r)"""
    return -(rstd * rstd * rstd) * b / count, -rstd * a / count
