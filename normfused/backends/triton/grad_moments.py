"""Step 1, backward: dz = dy*act'(z); per (chunk, outer index, channel) the sums of dz, of dz*(x - centre), and of dL/dact_weight.

Where the statistics are constants (evaluation) the same pass also writes dx = scale*dz and dresidual = dz. For scope position
it is the column reduction of rows too wide for a tile: mean and rstd belong to the positions, and rstd weighs the second sum.
On chip: two or three accumulators of a tile. Reads x, dy [and y or residual] once. Grid: as in moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import grad_activate, grad_activate_from_bit, grad_activate_from_y, grad_weight
from .apply import affine, channel_weight, coefficients, pre_activation
from .mask import tile_bytes, unpack
from .tiles import dense_strides, get, locate, put, tile_offsets, tile_start


@triton.jit
def activation_gradient(
    dy, z, source, at, live, bit, aw, SOURCE: tl.constexpr, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, factor=None
):  # fmt: skip
    """(dz, z), where z comes without the residual; ``source`` holds what SOURCE says, or with "mask" ``bit`` does and takes z's place.

    ``factor``: of a residual, or None.
    """
    dz = dy
    if SOURCE == "mask":
        dz = grad_activate_from_bit(dy, bit, ACT, P0)
        z = bit
    elif SOURCE == "y":
        dz = grad_activate_from_y(dy, get(source + at, live, dy.dtype), ACT, P0, P1)
    else:
        if SOURCE == "residual":
            r = get(source + at, live, dy.dtype)
            z += r if factor is None else r * factor
        dz = grad_activate(dy, z, aw, ACT, P0, P1)
    return dz, z


@triton.jit
def tile_bits(
    source, start, c0, s0, C, S, sC, sS, known,
    SOURCE: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The mask's bits of a tile (nothing to be used where there is none)."""
    if SOURCE == "mask":
        offsets, live = tile_bytes(c0, s0, C, S, sC, sS, known, NHWC, WIDE, BC, BS, GROUP)
        return unpack(tl.load(source + start // GROUP + offsets, mask=live, other=0), 0 if NHWC else 1, GROUP)
    else:
        return tl.zeros([1, 1], tl.int1)


@triton.jit
def grad_moments_kernel(
    x, dy, dshifted, source, dx, dresidual, part_dz, part_dz_xc, part_act, mean, scale_of, weight, shift_of, act_weight,
    residual_scale, against,
    outer, inner, C, D, S, s_tiles, tiles, chunks,
    POSITION: tl.constexpr, SLICES: tl.constexpr, SOURCE: tl.constexpr, GROUP: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    o, c0, chunk = locate(tl.program_id(0), chunks, C, BC, NHWC)
    c = c0 + tl.arange(0, BC)
    s = tl.arange(0, BS)
    known = c < C
    aw = channel_weight(act_weight, c, known, ACT_PER_CHANNEL, ACC)[:, None]
    offsets = tile_offsets(sC, sS, BC, BS, WIDE)
    if POSITION:
        gamma, shift = affine(tl.full([BC], 1.0, ACC), weight, shift_of, c, c, known, ACC)
    else:
        at = o.to(tl.int64) * (C // D) + c // D
        centre, scale, shift = coefficients(mean, scale_of, weight, shift_of, at, c, known, SLICES, ACC)
    factor = tl.load(residual_scale) if residual_scale is not None else None
    sum_dz = tl.zeros([BC, BS], ACC)
    sum_dz_xc = tl.zeros([BC, BS], ACC)
    sum_act = tl.zeros([BC, BS], ACC)
    for i in range(TILES):
        t = chunk * TILES + i
        n, s0, start = tile_start(o, t, c0, inner, C, S, sC, sS, s_tiles, BS)
        here = (s0 + s < S) & (t < tiles)
        live = known[:, None] & here[None, :]
        values = get(x + start + offsets, live, ACC)
        upstream = get(dy + start + offsets, live, ACC)
        if dshifted is not None:
            upstream += get(dshifted + start + offsets, live, ACC)
        if POSITION:
            rstd = tl.load(scale_of + n * S + s0 + s, mask=here, other=0.0)[None, :]
            if mean is not None:
                values = values - tl.load(mean + n * S + s0 + s, mask=here, other=0.0)[None, :]
            centred = values * rstd
            z = centred * gamma[:, None] + shift[:, None]
        else:
            centred = values - centre[:, None]
            z = pre_activation(values, centred, scale[:, None], shift[:, None], SLICES)
        bit = tile_bits(source, start, c0, s0, C, S, sC, sS, t < tiles, SOURCE, NHWC, WIDE, BC, BS, GROUP)
        dz, z = activation_gradient(upstream, z, source, start + offsets, live, bit, aw, SOURCE, ACT, P0, P1, factor)
        if against is not None:
            centred = get(against + start + offsets, live, ACC)
        sum_dz += dz
        sum_dz_xc += dz * centred
        if part_act is not None:
            sum_act += grad_weight(upstream, z, aw, ACT, SOURCE)
        if dx is not None:
            put(dx + start + offsets, dz * scale[:, None], live)
        if dresidual is not None:
            put(dresidual + start + offsets, dz, live)
    at = (chunk.to(tl.int64) * outer + o) * C + c
    tl.store(part_dz + at, tl.sum(sum_dz, 1), mask=known)
    tl.store(part_dz_xc + at, tl.sum(sum_dz_xc, 1), mask=known)
    if part_act is not None:
        tl.store(part_act + at, tl.sum(sum_act, 1), mask=known)
