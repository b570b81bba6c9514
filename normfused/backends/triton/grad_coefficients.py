"""Step 2, backward: the partial sums -> q, r of every set, and the gradients of the parameters.

`grad_sets_kernel` sums weight*partials over the chunks and channels of a set; `grad_channels_kernel` sums over chunks and outer
indices per channel: dbias = sum_dz, dweight = rstd*sum_dz_xc, and where a set is a channel (batch norm) it finds q and r too, so
that one launch does. Both in a fixed order; tiny: they read the partials once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import mean_only, renorm, rms, standard
from .tiles import put


@triton.jit
def grad_sets_kernel(
    part_dz, part_dz_xc, rstd, weight, q, r,
    outer, C, D, chunks, sets, count,
    RULE: tl.constexpr, ACC: tl.constexpr, BSET: tl.constexpr, BP: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    groups = C // D
    index = tl.program_id(0) * BSET + tl.arange(0, BSET)
    known = index < sets
    o = (index // groups).to(tl.int64)[:, None]
    c0 = (index % groups * D)[:, None]
    a = tl.zeros([BSET, BP], ACC)
    b = tl.zeros([BSET, BP], ACC)
    for i in range(LOOPS):
        p = (i * BP + tl.arange(0, BP))[None, :]
        k = p // D
        live = known[:, None] & (k < chunks)
        at = (k * outer + o) * C + c0 + p % D
        gamma = tl.load(weight + c0 + p % D, mask=live, other=0.0).to(ACC) if weight is not None else 1.0
        b += gamma * tl.load(part_dz_xc + at, mask=live, other=0.0)
        if RULE != "rms":
            a += gamma * tl.load(part_dz + at, mask=live, other=0.0)
    deviation = tl.load(rstd + index, mask=known, other=0.0)
    store_vjp(q, r, index, known, rstd, deviation, tl.sum(a, 1), tl.sum(b, 1), C, count, RULE)


@triton.jit
def store_vjp(q, r, index, known, saved, rstd, a, b, C, count, RULE: tl.constexpr):
    q_value, r_value = coefficients_vjp(saved, index, known, rstd, a, b, C, count, RULE)
    tl.store(q + index, q_value, mask=known)
    if RULE != "rms":
        tl.store(r + index, r_value, mask=known)


@triton.jit
def coefficients_vjp(saved, index, known, rstd, a, b, C, count, RULE: tl.constexpr):
    """(q, r) of the sets ``index``, whose weighted sums are a and b; ``saved``: what the forward saved, the first C of them being rstd."""
    if RULE == "rms":
        return rms.coefficients_vjp(rstd, b, count), 0.0
    elif RULE == "mean_only":
        return tl.zeros([index.shape[0]], a.dtype), mean_only.coefficients_vjp(a, count)
    elif RULE == "renorm":
        factor = tl.load(saved + C + index, mask=known, other=1.0)
        d = tl.load(saved + 2 * C + index, mask=known, other=0.0)
        return renorm.coefficients_vjp(tl.where(known, rstd, 1.0), factor, d, a, b, count)
    else:
        return standard.coefficients_vjp(rstd, a, b, count)


@triton.jit
def grad_channels_kernel(
    part_dz, part_dz_xc, part_act, rstd, weight, rule_weight, dweight, dbias, dact_weight, drule_weight, q, r,
    outer, C, D, chunks, count,
    RULE: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < C
    a = tl.zeros([BP, BC], ACC)
    b = tl.zeros([BP, BC], ACC)
    scaled = tl.zeros([BP, BC], ACC)
    cubed = tl.zeros([BP, BC], ACC)
    act = tl.zeros([BP, BC], ACC)
    for i in range(LOOPS):
        p = (i * BP + tl.arange(0, BP)).to(tl.int64)[:, None]
        live = known[None, :] & (p < chunks * outer)
        at = p * C + c[None, :]
        dz_xc = tl.load(part_dz_xc + at, mask=live, other=0.0)
        a += tl.load(part_dz + at, mask=live, other=0.0)
        if part_act is not None:
            act += tl.load(part_act + at, mask=live, other=0.0)
        if rstd is not None:
            deviation = tl.load(rstd + p % outer * (C // D) + c[None, :] // D, mask=live, other=0.0)
            scaled += dz_xc * deviation
            if drule_weight is not None:
                cubed += dz_xc * deviation * deviation * deviation
        else:
            scaled += dz_xc
        b += dz_xc
    gamma = tl.load(weight + c, mask=known, other=0.0).to(ACC) if weight is not None else tl.full([BC], 1.0, ACC)
    if dweight is not None:
        put(dweight + c, tl.sum(scaled, 0), known)
    if dbias is not None:
        put(dbias + c, tl.sum(a, 0), known)
    if dact_weight is not None:
        put(dact_weight + c, tl.sum(act, 0), known)
    if drule_weight is not None:
        at = c if EPS_PER_CHANNEL else c * 0
        eps = tl.load(rule_weight + at, mask=known, other=0.0).to(ACC)
        put(drule_weight + c, rms.eps_gradient(gamma * tl.sum(cubed, 0), eps), known)
    if q is not None:
        deviation = tl.load(rstd + c, mask=known, other=0.0)
        store_vjp(q, r, c, known, rstd, deviation, gamma * tl.sum(a, 0), gamma * tl.sum(b, 0), C, count, RULE)
