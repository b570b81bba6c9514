"""Batch-instance norm about the sample's own mean: y = scale*(x - mean_nc) + shift, with delta = mean_nc - mean_c and

scale = weight*(gate*rstd_c + (1 - gate)*rstd_nc)      shift = bias + weight*gate*rstd_c*delta

Backward, from A = sum dz and B = sum dz*(x - mean_nc) of every sample of S of a set's M elements, with T_n = rstd_nc*B,

T = rstd_c * sum_n (B + delta*A)      q_c = -weight*gate*rstd_c^2*T/M      dweight = gate*T + (1 - gate)*sum_n T_n
q = q_c - weight*(1 - gate)*rstd_nc^2*T_n/S                                dgate = weight*(T - sum_n T_n)
r = q_c*delta - weight*gate*rstd_c*(sum_n A)/M - weight*(1 - gate)*rstd_nc*A/S

where given statistics have no terms over M. Rows of a tile are samples; what belongs to a set has one row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def coefficients(delta, rstd, sample_rstd, gate, weight, bias):
    """(scale, shift)"""
    batch = gate * rstd
    return weight * (batch + (1.0 - gate) * sample_rstd), bias + weight * batch * delta


@triton.jit
def coefficients_vjp(delta, rstd, sample_rstd, gate, weight, a, b, S, count, GIVEN: tl.constexpr):
    """(q, r, dweight, dgate)"""
    of_samples = sample_rstd * b
    total = rstd * tl.sum(b + delta * a, 1, keep_dims=True)
    every = tl.sum(of_samples, 1, keep_dims=True)
    own = weight * (1.0 - gate) * sample_rstd / S
    q = -own * sample_rstd * of_samples
    r = -own * a
    if not GIVEN:
        batch = weight * gate * rstd / count
        square = -batch * rstd * total
        q += square
        r += square * delta - batch * tl.sum(a, 1, keep_dims=True)
    return q, r, gate * total + (1.0 - gate) * every, weight * (total - every)
