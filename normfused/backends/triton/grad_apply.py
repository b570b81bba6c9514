"""Step 3, backward: dx = dz_scale*dz + q*(x - centre) + r,  dresidual = dz [*residual_scale], dz from dy [+ dshifted] and z.

A program owns BC channels and up to TILES tiles, in the reverse order of step 1, whose last tiles still lie in L2. Reads x, dy
[and y or residual], writes dx [and dresidual]. Grid: outer indices x channel blocks x chunks, all on axis 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .apply import channel_weight, coefficients, pre_activation
from .grad_moments import activation_gradient, tile_bits
from .tiles import dense_strides, get, locate, put, tile_offsets, tile_start


@triton.jit
def grad_apply_kernel(
    x, dy, dshifted, source, dx, dresidual, mean, scale_of, weight, shift_of, act_weight, dz_scale_of, q_of, r_of, residual_scale,
    inner, C, D, S, s_tiles, tiles, chunks,
    SLICES: tl.constexpr, SOURCE: tl.constexpr, GROUP: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr,
    NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``dz_scale_of`` is per set and still to be multiplied by weight; None means rstd. q and r may be None, which is zero."""
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    o, c0, chunk = locate(tl.num_programs(0) - 1 - tl.program_id(0), chunks, C, BC, NHWC)
    c = c0 + tl.arange(0, BC)
    s = tl.arange(0, BS)
    known = c < C
    at = o.to(tl.int64) * (C // D) + c // D
    centre, scale, shift = coefficients(mean, scale_of, weight, shift_of, at, c, known, SLICES, ACC)
    dz_scale = scale
    if dz_scale_of is not None:
        dz_scale = tl.load(dz_scale_of + at, mask=known, other=0.0)
        if weight is not None:
            dz_scale *= tl.load(weight + c, mask=known, other=0.0).to(ACC)
    q = tl.load(q_of + at, mask=known, other=0.0)[:, None] if q_of is not None else 0.0
    r = tl.load(r_of + at, mask=known, other=0.0)[:, None] if r_of is not None else 0.0
    aw = channel_weight(act_weight, c, known, ACT_PER_CHANNEL, ACC)[:, None]
    factor = tl.load(residual_scale) if residual_scale is not None else None
    offsets = tile_offsets(sC, sS, BC, BS, WIDE)
    for i in range(TILES):
        t = chunk * TILES + i
        _, s0, start = tile_start(o, t, c0, inner, C, S, sC, sS, s_tiles, BS)
        live = known[:, None] & (s0 + s < S)[None, :] & (t < tiles)
        values = get(x + start + offsets, live, ACC)
        centred = values - centre[:, None]
        z = pre_activation(values, centred, scale[:, None], shift[:, None], SLICES)
        upstream = get(dy + start + offsets, live, ACC)
        if dshifted is not None:
            upstream += get(dshifted + start + offsets, live, ACC)
        bit = tile_bits(source, start, c0, s0, C, S, sC, sS, t < tiles, SOURCE, NHWC, WIDE, BC, BS, GROUP)
        dz, z = activation_gradient(upstream, z, source, start + offsets, live, bit, aw, SOURCE, ACT, P0, P1, factor)
        if dx is not None:
            put(dx + start + offsets, dz * dz_scale[:, None] + (q * centred + r), live)
        if dresidual is not None:
            put(dresidual + start + offsets, dz if factor is None else dz * factor, live)
