"""Step 1, forward: x -> per (chunk, outer index, channel) the mean and the sum of squares about it (rms: about zero).

A program owns BC channels and up to TILES tiles of BC x BS values. K = mean of the first tile; per lane it sums x - K and
(x - K)^2 over the tiles, and reduces across lanes once, at the end. K is the mean of a part of the chunk, so
(mean - K)^2 <= TILES*var and the correction multiplies the rounding error by TILES at the very worst, whatever the data.
On chip: two accumulators of a tile. Reads x once. Grid: outer indices x channel blocks x chunks, all on axis 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import covered, dense_strides, get, locate, tile_offsets, tile_start


@triton.jit
def moments_kernel(
    x, part_mean, part_m2,
    outer, inner, C, S, s_tiles, tiles, chunks,
    CENTRED: tl.constexpr, NHWC: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    C, S, sC, sS = dense_strides(C, S, NHWC, ALIGN)
    o, c0, chunk = locate(tl.program_id(0), chunks, C, BC, NHWC)
    c = c0 + tl.arange(0, BC)
    s = tl.arange(0, BS)
    inside = (c < C)[:, None]
    offsets = tile_offsets(sC, sS, BC, BS, WIDE)
    t = chunk * TILES
    _, s0, start = tile_start(o, t, c0, inner, C, S, sC, sS, s_tiles, BS)
    live = (s0 + s < S)[None, :]
    values = get(x + start + offsets, inside & live, ACC)
    shift = tl.zeros([BC], ACC)
    if CENTRED:
        shift = tl.sum(values, 1) / tl.minimum(S - s0, BS).to(ACC)
    difference = tl.where(live, values - shift[:, None], 0.0)
    total = difference
    squares = difference * difference
    for i in range(1, TILES):
        _, s0, start = tile_start(o, t + i, c0, inner, C, S, sC, sS, s_tiles, BS)
        live = (s0 + s < S)[None, :] & (t + i < tiles)
        values = get(x + start + offsets, inside & live, ACC)
        difference = tl.where(live, values - shift[:, None], 0.0)
        total += difference
        squares += difference * difference
    at = (chunk.to(tl.int64) * outer + o) * C + c
    m2 = tl.sum(squares, 1)
    if CENTRED:
        count = (covered(tl.minimum(t + TILES, tiles), S, s_tiles, BS) - covered(t, S, s_tiles, BS)).to(ACC)
        offset = tl.sum(total, 1) / count
        m2 -= offset * offset * count
        tl.store(part_mean + at, shift + offset, mask=c < C)
    tl.store(part_m2 + at, m2, mask=c < C)
