"""Scope position, backward: per position A = sum_c weight*dz, B = sum_c weight*dz*(x - mean), then dx [+ dh].

A program walks over BLOCKS blocks of BP positions; with BLOCKS_C = 1 a row's x and dz lie in registers and the program also keeps
the column sums of its rows (dweight, dbias, dact_weight), stored once, for `grad_channels_kernel` to add up over the programs.
Reads x, dy [and y or residual, dh] once, writes dx [and dresidual]. Wider rows are walked through twice, the second read from L2,
and their column sums are a pass of `grad_moments_kernel`. Grid: groups of BLOCKS blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import grad_weight
from .apply import affine, channel_weight
from .grad_moments import activation_gradient
from .rules import rms, standard
from .tiles import dense_strides, get, put


@triton.jit
def gradient(
    x, dy, source, weight, bias, act_weight, centre, deviation, c, at, live,
    C, SOURCE: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(dz, weight*dz, x - mean, dL/dact_weight) of a tile"""
    gamma, shift = affine(tl.full([c.shape[0]], 1.0, ACC), weight, bias, c, c, c < C, ACC)
    aw = channel_weight(act_weight, c, c < C, ACT_PER_CHANNEL, ACC)[None, :]
    centred = tl.where(live, get(x + at, live, ACC) - centre[:, None], 0.0)
    upstream = get(dy + at, live, ACC)
    z = centred * deviation[:, None] * gamma[None, :] + shift[None, :]
    dz, z = activation_gradient(upstream, z, source, at, live, live, aw, SOURCE, ACT, P0, P1)
    return dz, dz * gamma[None, :], centred, grad_weight(upstream, z, aw, ACT, SOURCE)


@triton.jit
def write(dx, dh, dresidual, dz, weighted, centred, dz_scale, q, r, at, live, ACC: tl.constexpr):
    if dresidual is not None:
        put(dresidual + at, dz, live)
    if dx is not None:
        result = weighted * dz_scale[:, None] + (q[:, None] * centred + r[:, None])
        if dh is not None:
            result += get(dh + at, live, ACC)
        put(dx + at, result, live)


@triton.jit
def grad_positions_kernel(
    x, dy, dh, source, dx, dresidual, mean, rstd, weight, bias, act_weight, part_dz, part_dz_xc, part_act,
    C, S, blocks, all_blocks,
    EPS: tl.constexpr, SOURCE: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, ONE: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    s = tl.arange(0, BP)
    c = tl.arange(0, BC)
    rows = s.to(tl.int64) if WIDE else s
    step = c.to(tl.int64) if WIDE else c
    offsets = rows[:, None] * sS + step[None, :] * sC
    jump = tl.cast(sC, tl.int64) * BC
    column_dz = tl.zeros([BP, BC], ACC)
    column_dz_xc = tl.zeros([BP, BC], ACC)
    column_act = tl.zeros([BP, BC], ACC)
    for i in range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        n = (block // blocks).to(tl.int64)
        s0 = (block % blocks).to(tl.int64) * BP
        here = (s0 + s < S) & (block < all_blocks)
        start = n * C * S + s0 * sS
        deviation = tl.load(rstd + n * S + s0 + s, mask=here, other=0.0)
        centre = tl.load(mean + n * S + s0 + s, mask=here, other=0.0) if mean is not None else tl.zeros([BP], ACC)
        if BLOCKS_C == 1:
            live = here[:, None] & (c < C)[None, :]
            dz, weighted, centred, act = gradient(
                x, dy, source, weight, bias, act_weight, centre, deviation, c, start + offsets, live,
                C, SOURCE, ACT, P0, P1, ACT_PER_CHANNEL, ACC,
            )  # fmt: skip
            a = tl.sum(weighted, 1)
            b = tl.sum(weighted * centred, 1)
            if part_dz is not None:
                column_dz += dz
                column_dz_xc += dz * (centred * deviation[:, None])
                if part_act is not None:
                    column_act += act
        else:
            lanes_a = tl.zeros([BP, BC], ACC)
            lanes_b = tl.zeros([BP, BC], ACC)
            for k in range(BLOCKS_C):
                at = start + k * jump + offsets
                dz, weighted, centred, act = gradient(
                    x, dy, source, weight, bias, act_weight, centre, deviation, k * BC + c, at, here[:, None] & (k * BC + c < C)[None, :],
                    C, SOURCE, ACT, P0, P1, ACT_PER_CHANNEL, ACC,
                )  # fmt: skip
                lanes_a += weighted
                lanes_b += weighted * centred
            a = tl.sum(lanes_a, 1)
            b = tl.sum(lanes_b, 1)
        dz_scale = deviation
        r = tl.zeros([BP], ACC)
        if mean is not None:
            q, r = standard.coefficients_vjp(deviation, a, b, C)
        elif ONE:
            dz_scale = deviation * deviation * deviation * EPS
            q = r
        else:
            q = rms.coefficients_vjp(deviation, b, C)
        if BLOCKS_C == 1:
            write(dx, dh, dresidual, dz, weighted, centred, dz_scale, q, r, start + offsets, live, ACC)
        else:
            for k in range(BLOCKS_C):
                at = start + k * jump + offsets
                live = here[:, None] & (k * BC + c < C)[None, :]
                dz, weighted, centred, act = gradient(
                    x, dy, source, weight, bias, act_weight, centre, deviation, k * BC + c, at, live,
                    C, SOURCE, ACT, P0, P1, ACT_PER_CHANNEL, ACC,
                )  # fmt: skip
                write(dx, dh, dresidual, dz, weighted, centred, dz_scale, q, r, at, live, ACC)
    if part_dz is not None:
        at = tl.program_id(0).to(tl.int64) * C + c
        tl.store(part_dz + at, tl.sum(column_dz, 0), mask=c < C)
        tl.store(part_dz_xc + at, tl.sum(column_dz_xc, 0), mask=c < C)
        if part_act is not None:
            tl.store(part_act + at, tl.sum(column_act, 0), mask=c < C)
