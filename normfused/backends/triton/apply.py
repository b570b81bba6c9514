"""Step 3, forward: z = (x - centre)*scale + shift [+ residual_scale*residual],  y = act(z) [+ residual],  shifted = y + shift_after.

A program owns BC channels and up to TILES tiles; the coefficients of its channels stay in registers. Programs run in the
reverse order of step 1, whose last tiles still lie in L2. Reads x [and residual], writes y [and shifted, the mask]; in evaluation of a
batch norm it also turns the running statistics into the coefficients. Grid: outer indices x channel blocks x chunks, all on axis 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, on_first_slope
from .coefficients import given
from .mask import pack, tile_bytes
from .tiles import dense_strides, get, locate, put, tile_offsets, tile_start


@triton.jit
def coefficients(mean, scale, weight, shift, at, c, known, SLICES: tl.constexpr, ACC: tl.constexpr):
    """(centre, scale, shift) of channels c in the sets ``at``. ``scale`` holds rstd per set; of slices all are per set."""
    centre = tl.load(mean + at, mask=known, other=0.0).to(ACC) if mean is not None else tl.zeros([c.shape[0]], ACC)
    a = tl.load(scale + at, mask=known, other=0.0)
    b = affine(a, weight, shift, at if SLICES else c, c, known, ACC)
    return centre, b[0], b[1]


@triton.jit
def affine(rstd, weight, bias, bias_at, c, known, ACC: tl.constexpr):
    """(weight*rstd, bias), where a missing weight is 1 and a missing bias 0."""
    a = rstd
    b = rstd * 0.0
    if weight is not None:
        a = rstd * tl.load(weight + c, mask=known, other=0.0).to(ACC)
    if bias is not None:
        b = tl.load(bias + bias_at, mask=known, other=0.0).to(ACC)
    return a, b


@triton.jit
def pre_activation(values, centred, scale, shift, SLICES: tl.constexpr):
    """z; of slices, whose rule is anyone's, the shift belongs to x itself."""
    if SLICES:
        return values * scale + shift
    else:
        return centred * scale + shift


@triton.jit
def channel_weight(act_weight, c, known, PER_CHANNEL: tl.constexpr, ACC: tl.constexpr):
    """act_weight of channels c (zero if the activation has none)."""
    if act_weight is None:
        return tl.zeros([c.shape[0]], ACC)
    else:
        return tl.load(act_weight + (c if PER_CHANNEL else c * 0), mask=known, other=0.0).to(ACC)


@triton.jit
def apply_kernel(
    x, residual, y, mask, mean, rstd, weight, bias, act_weight, given_mean, given_var, residual_scale, shift_after, shifted,
    inner, C, D, S, s_tiles, tiles, chunks,
    SLICES: tl.constexpr, POST: tl.constexpr, EPS: tl.constexpr, GROUP: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    o, c0, chunk = locate(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, BC, NHWC)
    c = c0 + tl.arange(0, BC)
    s = tl.arange(0, BS)
    known = c < C
    at = o.to(tl.int64) * (C // D) + c // D
    if given_var is not None:
        centre, deviation = given(c, known, known & (chunk == 0), given_mean, given_var, mean, rstd, EPS, ACC)
        scale, shift = affine(deviation, weight, bias, c, c, known, ACC)
    else:
        centre, scale, shift = coefficients(mean, rstd, weight, bias, at, c, known, SLICES, ACC)
    aw = channel_weight(act_weight, c, known, ACT_PER_CHANNEL, ACC)[:, None]
    after = tl.load(shift_after + at, mask=known, other=0.0)[:, None] if shift_after is not None else 0.0
    factor = tl.load(residual_scale) if residual_scale is not None else 1.0
    offsets = tile_offsets(sC, sS, BC, BS, WIDE)
    for i in range(TILES):
        t = chunk * TILES + i
        _, s0, start = tile_start(o, t, c0, inner, C, S, sC, sS, s_tiles, BS)
        live = known[:, None] & (s0 + s < S)[None, :] & (t < tiles)
        z = (get(x + start + offsets, live, ACC) - centre[:, None]) * scale[:, None] + shift[:, None]
        if residual is not None:
            r = get(residual + start + offsets, live, ACC)
            if POST:
                value = activate(z, aw, ACT, P0, P1) + r
            else:
                z += r if residual_scale is None else r * factor
                value = activate(z, aw, ACT, P0, P1)
        else:
            value = activate(z, aw, ACT, P0, P1)
        if y is not None:
            put(y + start + offsets, value, live)
        if shifted is not None:
            put(shifted + start + offsets, value + after, live)
        if mask is not None:
            at_byte, has = tile_bytes(c0, s0, C, S, sC, sS, t < tiles, NHWC, WIDE, BC, BS, GROUP)
            bits = pack(on_first_slope(z, aw, ACT), 0 if NHWC else 1, GROUP)
            tl.store(mask + start // GROUP + at_byte, bits, mask=has)
