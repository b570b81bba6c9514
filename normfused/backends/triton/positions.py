"""Scope position, forward, in one launch: a set is one position over all channels, as in layer norm and RMS norm of rows.

A tile is BP positions x BC channels (rows: channels contiguous; nchw maps: positions contiguous, channels S apart). With
BLOCKS_C = 1 the row lies in registers: x [and residual] are read once, y [and h] written. Wider rows are walked through twice,
first for the shifted sums of moments.py, then for y; the second read comes from L2. Grid: samples x blocks of positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .apply import affine, channel_weight
from .rules import standard
from .tiles import dense_strides, get, put, to_storage


@triton.jit
def normed_input(x, residual, h, at, live, PRE_NORM: tl.constexpr, ACC: tl.constexpr):
    """What is normalised: x, or h = x + residual as it is stored."""
    values = get(x + at, live, ACC)
    if PRE_NORM:
        total = to_storage(values + get(residual + at, live, ACC), x.dtype.element_ty)
        if h is not None:
            tl.store(h + at, total, mask=live)
        values = total.to(ACC)
    return values


@triton.jit
def write(
    y, residual, values, centre, deviation, weight, bias, act_weight, c, at, live,
    POST: tl.constexpr, PRE_ACT: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr, C, ACC: tl.constexpr,
):  # fmt: skip
    gamma, shift = affine(tl.full([c.shape[0]], 1.0, ACC), weight, bias, c, c, c < C, ACC)
    aw = channel_weight(act_weight, c, c < C, ACT_PER_CHANNEL, ACC)[None, :]
    z = (values - centre[:, None]) * deviation[:, None] * gamma[None, :] + shift[None, :]
    if PRE_ACT:
        z += get(residual + at, live, ACC)
    result = activate(z, aw, ACT, P0, P1)
    if POST:
        result += get(residual + at, live, ACC)
    put(y + at, result, live)


@triton.jit
def positions_kernel(
    x, residual, h, y, mean, rstd, weight, bias, act_weight,
    C, S, blocks,
    CENTRED: tl.constexpr, EPS: tl.constexpr, PRE_NORM: tl.constexpr, PRE_ACT: tl.constexpr, POST: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BLOCKS_C: tl.constexpr,
):  # fmt: skip
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s0 = (tl.program_id(0) % blocks).to(tl.int64) * BP
    s = tl.arange(0, BP)
    c = tl.arange(0, BC)
    here = s0 + s < S
    start = n * C * S + s0 * sS
    rows = s.to(tl.int64) if WIDE else s
    step = c.to(tl.int64) if WIDE else c
    offsets = rows[:, None] * sS + step[None, :] * sC
    jump = tl.cast(sC, tl.int64) * BC
    live = here[:, None] & (c < C)[None, :]
    values = normed_input(x, residual, h, start + offsets, live, PRE_NORM, ACC)
    shift = tl.zeros([BP], ACC)
    if CENTRED:
        shift = tl.sum(values, 1) / tl.minimum(C, BC)
    difference = tl.where(live, values - shift[:, None], 0.0)
    total = difference
    squares = difference * difference
    for i in range(1, BLOCKS_C):
        more = here[:, None] & (i * BC + c < C)[None, :]
        at = start + i * jump + offsets
        difference = tl.where(more, normed_input(x, residual, h, at, more, PRE_NORM, ACC) - shift[:, None], 0.0)
        total += difference
        squares += difference * difference
    centre = shift
    v = tl.sum(squares, 1) / C
    if CENTRED:
        offset = tl.sum(total, 1) / C
        v -= offset * offset
        v = tl.where(v < 0, 0.0, v)  # a constant row may round below zero
        centre = shift + offset
        tl.store(mean + n * S + s0 + s, centre, mask=here)
    deviation = standard.reciprocal_deviation(v, EPS)
    tl.store(rstd + n * S + s0 + s, deviation, mask=here)
    if BLOCKS_C == 1:
        write(
            y, residual, values, centre, deviation, weight, bias, act_weight, c, start + offsets, live,
            POST, PRE_ACT, ACT, P0, P1, ACT_PER_CHANNEL, C, ACC,
        )  # fmt: skip
    else:
        for i in range(BLOCKS_C):
            more = here[:, None] & (i * BC + c < C)[None, :]
            at = start + i * jump + offsets
            values = normed_input(x, residual, None, at, more, PRE_NORM, ACC)
            write(
                y, residual, values, centre, deviation, weight, bias, act_weight, i * BC + c, at, more,
                POST, PRE_ACT, ACT, P0, P1, ACT_PER_CHANNEL, C, ACC,
            )  # fmt: skip
