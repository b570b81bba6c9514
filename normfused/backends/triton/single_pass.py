"""Steps 1 to 3, forward, in one launch: the sets of a program lie in its registers between the statistics and y = act(z).

A tile is BSET sets x BR rows x BS columns. Scope sample_group: rows are the channels of a group. Scope channel: rows are the
samples (nchw), or there is one row and columns run over samples and positions (nhwc); of batch-instance norm, whose samples have
moments of their own, rows are samples in both. Variance about the mean, corrected for the rounding of the mean. On chip: x. Reads x
[and residual] once, writes y [and the mask]: 2 (3) elements each. Grid: outer indices x blocks of sets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, on_first_slope
from .coefficients import finish, given
from .mask import pack, set_bytes
from .rules import batch_instance, standard
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
def total(values, BY_ROW: tl.constexpr):
    """The sum over the columns and, unless BY_ROW, the rows of every set; no axis goes."""
    sums = tl.sum(values, 2, keep_dims=True)
    return sums if BY_ROW else tl.sum(sums, 1, keep_dims=True)


@triton.jit
def moments(values, live, count, BY_ROW: tl.constexpr):
    """(mean, biased variance) of every set or, BY_ROW, of every row of it, of ``count`` elements; no axis goes."""
    rough = total(values, BY_ROW) / count
    centred = tl.where(live, values - rough, 0.0)
    offset = total(centred, BY_ROW) / count
    v = total(centred * centred, BY_ROW) / count - offset * offset
    return rough + offset, tl.where(v < 0, 0.0, v)  # that of equal numbers may round below zero


@triton.jit
def at_samples(index, C, BR: tl.constexpr):
    """Where the batch_instance rule keeps a number of every (set, row): behind those of the batch."""
    return ((1 + tl.arange(0, BR)).to(tl.int64)[None, :] * C + index[:, None])[:, :, None]


@triton.jit
def single_pass_kernel(
    x, residual, y, mask, mean, var, rstd, weight, bias, act_weight, rule_weight, running_mean, running_var, counter, r_max, d_max,
    momentum: tl.float64,
    C, D, S, R, so, sg, sR, sS, groups, per_outer, count,
    RULE: tl.constexpr, GIVEN: tl.constexpr, EPS: tl.constexpr, EPS_PER_CHANNEL: tl.constexpr, AVERAGE: tl.constexpr,
    POST: tl.constexpr, GROUP: tl.constexpr, NHWC: tl.constexpr,
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
    if RULE == "batch_instance":
        centre, v = moments(values, live, S, True)
        sample_rstd = standard.reciprocal_deviation(v, EPS)
        at = at_samples(index, C, BR)
        tl.store(mean + at, centre, mask=inside[:, :, None])
        tl.store(rstd + at, sample_rstd, mask=inside[:, :, None])
        if GIVEN:
            batch_mean, batch_rstd = given(index, j < per_outer, j < per_outer, running_mean, running_var, mean, rstd, EPS, ACC)
        else:
            middle, spread = moments(centre, inside[:, :, None], R, False)
            batch_mean, batch_rstd = finish(
                index, j < per_outer, sum_set(middle), sum_set(spread + total(v, False) / R), mean, var, rstd, weight, None,
                running_mean, running_var, counter, r_max, d_max, momentum, C, count, RULE, EPS, False, AVERAGE, ACC,
            )  # fmt: skip
        scale, shift = batch_instance.coefficients(
            centre - over_set(batch_mean), over_set(batch_rstd), sample_rstd, over_columns(rule_weight, c, known, 1.0, ACC),
            over_columns(weight, c, known, 1.0, ACC), over_columns(bias, c, known, 0.0, ACC),
        )  # fmt: skip
    else:
        centre = tl.zeros([BSET, 1, 1], ACC)
        if RULE != "rms":
            centre, v = moments(values, live, count, False)
        else:
            v = total(values * values, False) / count
        set_centre, deviation = finish(
            index, j < per_outer, sum_set(centre), sum_set(v), mean, var, rstd, weight, rule_weight, running_mean, running_var, counter,
            r_max, d_max, momentum, C, count, RULE, EPS, EPS_PER_CHANNEL, AVERAGE, ACC,
        )  # fmt: skip
        centre = over_set(set_centre)
        scale = over_set(deviation) * over_columns(weight, c, known, 1.0, ACC)
        shift = over_columns(bias, c, known, 0.0, ACC)
    z = (values - centre) * scale + shift
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
