"""Step 2, forward: the partial moments of a set -> mean, variance, rstd; and the running statistics.

A program owns BSET sets and merges their partials (chunks x channels of the set) in a fixed order with Chan's formula:
mean = m_0 + sum count_k (m_k - m_0) / count,  M2 = sum M2_k + count_k (m_k - mean)^2. Tiny: reads the partials (means twice).
The counter: with a momentum nobody reads it, and program 0 counts; a cumulative average reads it, and the host counted before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rules import renorm, rms, standard
from .tiles import covered, put


@triton.jit
def finalize_kernel(
    part_mean, part_m2, mean, var, rstd, weight, rule_weight, running_mean, running_var, counter, r_max, d_max, momentum: tl.float64,
    outer, C, D, S, s_tiles, tiles, chunks, sets, count,
    RULE: tl.constexpr, EPS: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
    BS: tl.constexpr, TILES: tl.constexpr, BSET: tl.constexpr, BP: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    groups = C // D
    index = tl.program_id(0) * BSET + tl.arange(0, BSET)
    known = index < sets
    o = (index // groups).to(tl.int64)[:, None]
    c0 = (index % groups * D)[:, None]
    total = tl.zeros([BSET, BP], ACC)
    first = tl.zeros([BSET], ACC)
    if RULE != "rms":
        first = tl.load(part_mean + (index // groups).to(tl.int64) * C + index % groups * D, mask=known, other=0.0)
        for i in range(LOOPS):
            p = (i * BP + tl.arange(0, BP))[None, :]
            k = p // D
            live = known[:, None] & (k < chunks)
            m = tl.load(part_mean + (k * outer + o) * C + c0 + p % D, mask=live, other=0.0)
            share = (covered(tl.minimum((k + 1) * TILES, tiles), S, s_tiles, BS) - covered(k * TILES, S, s_tiles, BS)).to(ACC)
            total += tl.where(live, (m - first[:, None]) * share, 0.0)
    centre = first + tl.sum(total, 1) / count
    m2 = tl.zeros([BSET, BP], ACC)
    for i in range(LOOPS):
        p = (i * BP + tl.arange(0, BP))[None, :]
        k = p // D
        live = known[:, None] & (k < chunks)
        at = (k * outer + o) * C + c0 + p % D
        m2 += tl.load(part_m2 + at, mask=live, other=0.0)
        if RULE != "rms":
            m = tl.load(part_mean + at, mask=live, other=0.0) - centre[:, None]
            share = (covered(tl.minimum((k + 1) * TILES, tiles), S, s_tiles, BS) - covered(k * TILES, S, s_tiles, BS)).to(ACC)
            m2 += tl.where(live, m * m * share, 0.0)
    v = tl.sum(m2, 1) / count
    v = tl.where(v < 0, 0.0, v)  # the correction of a constant chunk may round below zero
    finish(
        index, known, centre, v, mean, var, rstd, weight, rule_weight, running_mean, running_var, counter, r_max, d_max, momentum, C, count,
        RULE, EPS, EPS_PER_CHANNEL, AVERAGE, ACC,
    )  # fmt: skip


@triton.jit
def finish(
    index, known, centre, v, mean, var, rstd, weight, rule_weight, running_mean, running_var, counter, r_max, d_max, momentum, C, count,
    RULE: tl.constexpr, EPS: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the moments of the sets ``index`` and, where a set is a channel, update the running statistics; gives (centre, rstd)."""
    tracked = centre
    if RULE == "mean_only":
        deviation = tl.full([index.shape[0]], 1.0, ACC)
        if weight is not None:
            tracked = centre * tl.load(weight + index, mask=known, other=0.0).to(ACC)
    else:
        deviation = reciprocal(index, known, v, rule_weight, C, EPS, EPS_PER_CHANNEL, ACC)
    if RULE == "renorm":
        spread = tl.sqrt(v + EPS)
        running_deviation = tl.load(running_var + index, mask=known, other=1.0).to(ACC)
        factor, d = renorm.correction(
            centre, spread, tl.load(running_mean + index, mask=known, other=0.0).to(ACC), running_deviation,
            tl.load(r_max).to(ACC), tl.load(d_max).to(ACC),
        )  # fmt: skip
        tl.debug_barrier()  # all threads have read what one of them is about to move on
        centre, deviation = renorm.coefficients(centre, deviation, factor, d)
        tl.store(rstd + C + index, factor, mask=known)
        tl.store(rstd + 2 * C + index, d, mask=known)
    else:
        spread = v * count / (count - 1)
    if mean is not None:
        tl.store(mean + index, centre, mask=known)
    if var is not None:
        tl.store(var + index, v, mask=known)
    if rstd is not None:
        tl.store(rstd + index, deviation, mask=known)
    if running_mean is not None:
        update_running(running_mean + index, tracked, known, counter, momentum, AVERAGE, ACC)
    if running_var is not None:
        update_running(running_var + index, spread, known, counter, momentum, AVERAGE, ACC)
    count_batch(counter, AVERAGE)
    return centre, deviation


@triton.jit
def given(c, known, writes, running_mean, running_var, mean, rstd, EPS: tl.constexpr, ACC: tl.constexpr):
    """(mean, rstd) of given statistics; stored too, where ``writes`` holds."""
    centre = tl.load(running_mean + c, mask=known, other=0.0).to(ACC)
    deviation = standard.reciprocal_deviation(tl.load(running_var + c, mask=known, other=1.0).to(ACC), EPS)
    tl.store(mean + c, centre, mask=writes)
    tl.store(rstd + c, deviation, mask=writes)
    return centre, deviation


@triton.jit
def reciprocal(index, known, v, rule_weight, C, EPS: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, ACC: tl.constexpr):
    if rule_weight is not None:
        at = index % C if EPS_PER_CHANNEL else index * 0
        return standard.reciprocal_deviation(v, rms.effective_eps(tl.load(rule_weight + at, mask=known, other=0.0).to(ACC), EPS))
    else:
        return standard.reciprocal_deviation(v, EPS)


@triton.jit
def update_running(running, value, known, counter, momentum, AVERAGE: tl.constexpr, ACC: tl.constexpr):
    """running <- (1 - factor)*running + factor*value, rounded once."""
    old = tl.load(running, mask=known, other=0.0).to(ACC)
    if AVERAGE:
        factor = 1.0 / tl.load(counter).to(ACC)
        new = old * (1.0 - factor) + value * factor
    else:
        new = (old * (1.0 - momentum) + value * momentum).to(ACC)
    put(running, new, known)


@triton.jit
def count_batch(counter, AVERAGE: tl.constexpr):
    if counter is not None and not AVERAGE:
        tl.store(counter, tl.load(counter) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def average_running_kernel(
    mean, var, running_mean, running_var, counter, momentum: tl.float64, N, C, count,
    AVERAGE: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """Tracked instance norm: the running statistics take the average over the samples. mean, var: (N, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    known = c < C
    means = tl.zeros([BN, BC], ACC)
    vars = tl.zeros([BN, BC], ACC)
    for i in range(LOOPS):
        n = (i * BN + tl.arange(0, BN)).to(tl.int64)
        live = (n < N)[:, None] & known[None, :]
        means += tl.load(mean + n[:, None] * C + c[None, :], mask=live, other=0.0)
        vars += tl.load(var + n[:, None] * C + c[None, :], mask=live, other=0.0)
    if running_mean is not None:
        update_running(running_mean + c, tl.sum(means, 0) / N, known, counter, momentum, AVERAGE, ACC)
    if running_var is not None:
        update_running(running_var + c, tl.sum(vars, 0) / N * count / (count - 1), known, counter, momentum, AVERAGE, ACC)
    count_batch(counter, AVERAGE)
