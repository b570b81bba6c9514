"""What every kernel shares: which tile a program owns, how its memory is addressed, and how values enter and leave it.

A tile is BC channels x BS positions of one sample. Tensors are dense, so one offset serves x, residual, y, dy and dx:
n*C*S + c*sC + s*sS with (sC, sS) = (S, 1) in nchw and (1, C) in nhwc. The start of a tile is a 64-bit number; inside it 32 bits
do unless the plan says WIDE.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"))


@triton.jit
def to_storage(value, storage: tl.constexpr):
    """value rounded to the nearest value of type storage, ties to even."""
    if INTERPRETED and storage == tl.bfloat16:
        # Triton's interpreter truncates; after this rounding there is nothing left to truncate
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(value != value, value.to(tl.float32), rounded).to(storage)
    else:
        return value.to(storage)


@triton.jit
def put(pointer, value, mask):
    tl.store(pointer, to_storage(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def get(pointer, mask, ACC: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(ACC)


@triton.jit
def divisible(length, ALIGN: tl.constexpr):
    """length, which is a multiple of ALIGN, so that the compiler sees it; by itself it only knows of multiples of 16."""
    if ALIGN == 1:
        return length
    else:
        return length // ALIGN * ALIGN


@triton.jit
def dense_strides(C, S, NHWC: tl.constexpr, ALIGN: tl.constexpr):
    """(C, S, stride of a channel, stride of a position); ALIGN divides the length of what is contiguous."""
    if NHWC:
        C = divisible(C, ALIGN)
        return C, S, 1, C
    else:
        S = divisible(S, ALIGN)
        return C, S, S, 1


@triton.jit
def locate(pid, chunks, C, BC: tl.constexpr, NHWC: tl.constexpr):
    """(outer index, first channel, chunk) of a program; neighbours read neighbouring memory."""
    blocks = tl.cdiv(C, BC)
    if NHWC:
        block = pid % blocks
        chunk = (pid // blocks) % chunks
    else:
        chunk = pid % chunks
        block = (pid // chunks) % blocks
    return pid // (chunks * blocks), block * BC, chunk


@triton.jit
def tile_start(o, t, c0, inner, C, S, sC, sS, s_tiles, BS: tl.constexpr):
    """(sample, first position, offset) of tile t of outer index o; the tiles of a chunk run over its samples and positions."""
    n = (o * inner + t // s_tiles).to(tl.int64)
    s0 = (t % s_tiles).to(tl.int64) * BS
    return n, s0, n * C * S + c0.to(tl.int64) * sC + s0 * sS


@triton.jit
def tile_offsets(sC, sS, BC: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr):
    rows = tl.arange(0, BC)
    columns = tl.arange(0, BS)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return rows[:, None] * sC + columns[None, :] * sS


@triton.jit
def covered(t, S, s_tiles, BS: tl.constexpr):
    """How many positions the first t tiles hold."""
    t = t.to(tl.int64)
    return (t // s_tiles) * S + tl.minimum((t % s_tiles) * BS, S)
