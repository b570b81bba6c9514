"""Batch Renorm: the standard rule about another centre, weight*scale*(x - centre) + bias with scale = r*rstd, centre = mean - d/scale.

r and d compare the batch with the running mean and deviation before this step and are constants of the backward. Saved are (scale, r, d).
With shift = mean - centre and B, which is about the mean, from B' about the centre:

dz_scale = weight*scale      B = B' - shift*A      q = -scale*rstd^2*B/M      r = -scale*A/M - q*shift
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp(v, lowest, highest):
    return tl.where(v < lowest, lowest, tl.where(v > highest, highest, v))  # NaN stays


@triton.jit
def correction(mean, deviation, running_mean, running_deviation, r_max, d_max):
    """(r, d)"""
    return clamp(deviation / running_deviation, 1.0 / r_max, r_max), clamp((mean - running_mean) / running_deviation, -d_max, d_max)


@triton.jit
def coefficients(mean, rstd, r, d):
    """(centre, scale)"""
    scale = rstd * r
    return mean - d / scale, scale


@triton.jit
def coefficients_vjp(scale, factor, d, a, b, count):
    """(q, r); ``factor`` is the r of the forward."""
    rstd = scale / factor
    shift = d / scale
    q = -(scale * rstd * rstd) * (b - shift * a) / count
    return q, -scale * a / count - q * shift
