"""The bit mask a forward leaves for the backward where a residual comes before an activation whose derivative takes two values.

One byte per 16-byte vector of x, in x's order: byte k holds elements k*GROUP to (k+1)*GROUP - 1, bit j the j-th of them (GROUP is 8 for
2-byte types, 4 for float32, 2 for float64). A thread that holds a vector holds all the bits of its byte: packing needs no exchange
between lanes. Runs that are no whole number of vectors, and groups of channels that share them, have none (`plan.mask_group`).
Traffic: 1/16 of x, written once, and read by each pass of the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import tile_offsets


@triton.jit
def pack(bits, AXIS: tl.constexpr, GROUP: tl.constexpr):
    """Bytes of a tile of booleans whose axis AXIS is contiguous in memory."""
    A: tl.constexpr = bits.shape[0]
    B: tl.constexpr = bits.shape[1]
    weights = tl.arange(0, GROUP)
    if AXIS == 0:
        grouped = tl.reshape(bits.to(tl.int32), [A // GROUP, GROUP, B]) << weights[None, :, None]
    else:
        grouped = tl.reshape(bits.to(tl.int32), [A, B // GROUP, GROUP]) << weights[None, None, :]
    return tl.sum(grouped, AXIS + 1).to(tl.uint8)


@triton.jit
def unpack(packed, AXIS: tl.constexpr, GROUP: tl.constexpr):
    A: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    weights = tl.arange(0, GROUP)
    values = packed.to(tl.int32)
    if AXIS == 0:
        return tl.reshape((values[:, None, :] >> weights[None, :, None]) & 1, [A * GROUP, B]) != 0
    else:
        return tl.reshape((values[:, :, None] >> weights[None, None, :]) & 1, [A, B * GROUP]) != 0


@triton.jit
def tile_bytes(
    c0, s0, C, S, sC, sS, known, NHWC: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """(offsets, live) of the bytes of a tile of channels x positions."""
    if NHWC:
        offsets = tile_offsets(sC, sS // GROUP, BC // GROUP, BS, WIDE)
        live = (c0 + tl.arange(0, BC // GROUP) * GROUP < C)[:, None] & (s0 + tl.arange(0, BS) < S)[None, :] & known
    else:
        offsets = tile_offsets(sC // GROUP, sS, BC, BS // GROUP, WIDE)
        live = (c0 + tl.arange(0, BC) < C)[:, None] & (s0 + tl.arange(0, BS // GROUP) * GROUP < S)[None, :] & known
    return offsets, live


@triton.jit
def set_bytes(
    j0, per_outer, R, S, sg, sR, sS,
    NHWC: tl.constexpr, WIDE: tl.constexpr, BSET: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(offsets, live) of the bytes of a tile of (sets x rows) x columns; in nhwc the channels of neighbouring sets share bytes."""
    if NHWC:
        leader = tl.arange(0, BSET * BR // GROUP) * GROUP
        s = tl.arange(0, BS)
    else:
        leader = tl.arange(0, BSET * BR)
        s = tl.arange(0, BS // GROUP) * GROUP
    j = leader // BR
    row = leader % BR
    live = ((j0 + j < per_outer) & (row < R))[:, None] & (s < S)[None, :]
    if WIDE:
        j = j.to(tl.int64)
        row = row.to(tl.int64)
        s = s.to(tl.int64)
    return ((j * sg + row * sR) // GROUP)[:, None] + (s * sS // GROUP)[None, :], live
