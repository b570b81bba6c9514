"""Steps 1 to 3, forward, in one launch: the sets of a program lie in its registers between the statistics and y = act(z).

A tile is BSET sets x BR rows x BS columns. Scope sample_group: rows are the channels of a group. Scope channel: rows are the
samples (nchw), or there is one row and columns run over samples and positions (nhwc). Variance about the mean, corrected for the
rounding of the mean. On chip: x. Reads x [and residual] once, writes y [and the mask]: 2 (3) elements each. Grid: outer indices x
blocks of sets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, on_first_slope
from .coefficients import finish
from .mask import pack, set_bytes
from .tiles import divisible, get, put


@triton.jit
def locate_sets(per_outer, so, sg, BSET: tl.constexpr):
    """(first index within the outer index, all of them, set index, offset of the first set)"""
    blocks = tl.cdiv(per_outer, BSET)
    o = tl.program_id(0) // blocks
    j0 = tl.program_id(0) % blocks * BSET
    j = j0 + tl.arange(0, BSET)
    return j0, j, o * per_outer + j, o.to(tl.int64) * so + j0.to(tl.int64) * sg


@triton.jit
def set_offsets(sg, sR, sS, BSET: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr):
    j = tl.arange(0, BSET)
    row = tl.arange(0, BR)
    column = tl.arange(0, BS)
    if WIDE:
        j = j.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return (j * sg)[:, None, None] + (row * sR)[None, :, None] + (column * sS)[None, None, :]


@triton.jit
def channels_of(index, groups, D, BR: tl.constexpr, ROWS_ARE_CHANNELS: tl.constexpr):
    """Channel of every (set, row); one column of them where a set is a channel."""
    if ROWS_ARE_CHANNELS:
        return (index % groups * D)[:, None] + tl.arange(0, BR)[None, :]
    else:
        return (index % groups)[:, None]


@triton.jit
def over_columns(pointer, c, known, default: tl.constexpr, ACC: tl.constexpr):
    """A per-channel parameter shaped against the tile."""
    if pointer is None:
        return tl.full([1, 1, 1], default, ACC)
    else:
        return tl.load(pointer + c, mask=known, other=0.0).to(ACC)[:, :, None]


@triton.jit
def over_set(values):
    return values[:, None, None]


@triton.jit
def sum_set(values):
    return tl.sum(tl.sum(values, 2), 1)


@triton.jit
def single_pass_kernel(
    x, residual, y, mask, mean, var, rstd, weight, bias, act_weight, rule_weight, running_mean, running_var, counter, r_max, d_max,
    momentum: tl.float64,
    C, D, S, R, so, sg, sR, sS, groups, per_outer, count,
    RULE: tl.constexpr, EPS: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, AVERAGE: tl.constexpr, POST: tl.constexpr,
    GROUP: tl.constexpr, NHWC: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr, ROWS_ARE_CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BSET: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    so = divisible(so, ALIGN)
    sg = divisible(sg, ALIGN)
    sR = divisible(sR, ALIGN)
    S = divisible(S, ALIGN)
    j0, j, index, start = locate_sets(per_outer, so, sg, BSET)
    offsets = set_offsets(sg, sR, sS, BSET, BR, BS, WIDE)
    inside = (j < per_outer)[:, None] & (tl.arange(0, BR) < R)[None, :]
    live = inside[:, :, None] & (tl.arange(0, BS) < S)[None, None, :]
    c = channels_of(index, groups, D, BR, ROWS_ARE_CHANNELS)
    known = inside if ROWS_ARE_CHANNELS else (j < per_outer)[:, None]
    values = get(x + start + offsets, live, ACC)
    centre = tl.zeros([BSET], ACC)
    if RULE != "rms":
        rough = sum_set(values) / count
        centred = tl.where(live, values - over_set(rough), 0.0)
        offset = sum_set(centred) / count
        v = sum_set(centred * centred) / count - offset * offset
        v = tl.where(v < 0, 0.0, v)  # a constant set may round below zero
        centre = rough + offset
    else:
        v = sum_set(values * values) / count
    centre, deviation = finish(
        index, j < per_outer, centre, v, mean, var, rstd, weight, rule_weight, running_mean, running_var, counter, r_max, d_max, momentum,
        C, count, RULE, EPS, EPS_PER_CHANNEL, AVERAGE, ACC,
    )  # fmt: skip
    scale = over_set(deviation) * over_columns(weight, c, known, 1.0, ACC)
    z = (values - over_set(centre)) * scale + over_columns(bias, c, known, 0.0, ACC)
    aw = over_columns(act_weight, c if ACT_PER_CHANNEL else c * 0, known, 0.0, ACC)
    if residual is not None:
        r = get(residual + start + offsets, live, ACC)
        if POST:
            put(y + start + offsets, activate(z, aw, ACT, P0, P1) + r, live)
        else:
            z += r
            put(y + start + offsets, activate(z, aw, ACT, P0, P1), live)
            if mask is not None:
                bits = tl.reshape(on_first_slope(z, aw, ACT), [BSET * BR, BS])
                at, has = set_bytes(j0, per_outer, R, S, sg, sR, sS, NHWC, WIDE, BSET, BR, BS, GROUP)
                tl.store(mask + start // GROUP + at, pack(bits, 0 if NHWC else 1, GROUP), mask=has)
    else:
        put(y + start + offsets, activate(z, aw, ACT, P0, P1), live)
