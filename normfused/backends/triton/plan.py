"""How a problem is cut into tiles: a pure function of the problem and of the device's limits, testable without a GPU.

Routes: ``single_pass`` where one program's registers hold a set between its statistics and its output, else ``two_pass``. ``slices``
(the four steps for rules written in PyTorch) is two_pass whose middle is the caller's.

All scopes but position are one geometry: x is (outer, inner, C, S) and a set is an outer index and D neighbouring channels.

=============  ==================  =======  ========  ===========
scope          outer               inner    S         D
=============  ==================  =======  ========  ===========
channel, nchw  1                   N        S         1
channel, nhwc  1                   1        N*S       1       (1, N, S where samples have moments too)
sample_group   N                   1        S         C/groups
position       1                   N or 1   S or N*S  (set: a position)
=============  ==================  =======  ========  ===========
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...problem import BATCH_INSTANCE, CHANNEL, NHWC, POSITION, PRE_ACT, RMS, SAMPLE_GROUP, Problem

SINGLE_PASS, TWO_PASS, SLICES = "single_pass", "two_pass", "slices"


@dataclass(frozen=True)
class Limits:
    """What of the device a plan depends on. Tiles count 4-byte accumulators; test_compile.py checks that none of them spills."""

    processors: int = 132
    stream_tile: int = 2048  # 4 warps: 16 values a lane, two 16-byte loads of half precision
    set_tile: int = 16384  # forward: 16 warps hold x once
    grad_set_tile: int = 8192  # backward: x and dz
    row_tile: int = 16384
    grad_row_tile: int = 8192  # x, dz and the column sums
    max_tiles: int = 16  # per program; also bounds the shifted sums' loss of digits (moments.py)


@dataclass(frozen=True)
class Geometry:
    outer: int
    inner: int
    C: int
    S: int
    D: int
    nhwc: bool

    @property
    def sC(self) -> int:
        return 1 if self.nhwc else self.S

    @property
    def sS(self) -> int:
        return self.C if self.nhwc else 1

    @property
    def vector(self) -> int:
        """The power of 2 up to 16 that divides the contiguous length, so that many elements may be accessed together."""
        return math.gcd(self.C if self.nhwc else self.S, 16)

    @property
    def sets(self) -> int:
        return self.outer * (self.C // self.D)


@dataclass(frozen=True)
class Stream:
    """Tiles of the kernels that stream: BC channels x BS positions, ``TILES`` of them to a program."""

    BC: int
    BS: int
    TILES: int
    s_tiles: int
    tiles: int
    chunks: int
    programs: int
    wide: bool
    num_warps: int


@dataclass(frozen=True)
class SetTile:
    """BSET sets x BR rows x BS columns; a set is R rows ``row_stride`` apart, sets of an outer index are ``set_stride`` apart."""

    BSET: int
    BR: int
    BS: int
    R: int
    S: int
    row_stride: int
    set_stride: int
    outer_stride: int
    per_outer: int
    programs: int
    wide: bool
    num_warps: int


@dataclass(frozen=True)
class RowTile:
    """BP positions x BC channels, ``BLOCKS_C`` times for a whole row; ``BLOCKS`` position blocks to a program of the backward."""

    BP: int
    BC: int
    BLOCKS_C: int
    BLOCKS: int
    blocks: int
    all_blocks: int
    wide: bool
    num_warps: int


@dataclass(frozen=True)
class Plan:
    route: str
    geometry: Geometry
    stream: Stream
    sets: SetTile | None = None
    rows: RowTile | None = None


def power_of_2(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def geometry(p: Problem) -> Geometry:
    nhwc = p.layout == NHWC or p.S == 1
    if p.scope == SAMPLE_GROUP:
        return Geometry(p.N, 1, p.C, p.S, p.C // p.groups, nhwc)
    inner, S = (1, p.N * p.S) if nhwc and p.rule != BATCH_INSTANCE else (p.N, p.S)
    return Geometry(1, inner, p.C, S, 1, nhwc)


def mask_group(p: Problem) -> int:
    """Elements to a byte of the bit mask (mask.py); 0 where y tells the derivative, or the residual.

    Contiguous runs must be whole 16-byte vectors. In nhwc the channels of a group must be whole vectors, or a power of 2. The
    steps that stand in for a single pass of batch-instance norm have no mask.
    """
    if p.rule == BATCH_INSTANCE:
        return 0
    g, group = geometry(p), 16 // p.dtype.itemsize
    if p.residual_mode != PRE_ACT or not p.act.has_two_slopes or p.scope == POSITION or (g.C if g.nhwc else g.S) % group:
        return 0
    apart = p.scope == SAMPLE_GROUP and g.nhwc and g.D % group and power_of_2(g.D) != g.D
    return 0 if apart else group


def mask_bytes(p: Problem) -> int:
    group = mask_group(p)
    return p.N * p.C * p.S // group if group else 0


def _block(length: int, sizes: tuple[int, ...]) -> int:
    """The largest size, unless a smaller one pads ``length`` by at least a tenth less."""
    best = min(sizes[0], power_of_2(length))
    for size in sizes[1:]:
        if cdiv(length, size) * size * 1.1 < cdiv(length, best) * best:
            best = size
    return best


def stream(p: Problem, limits: Limits) -> Stream:
    g = geometry(p)
    tile = limits.stream_tile // 2 if p.dtype == torch.float64 else limits.stream_tile
    if g.nhwc:
        BC = _block(g.C, (min(tile, 128), min(tile, 64), min(tile, 32)))
        BS = min(power_of_2(g.S), max(tile // BC, 1))
    else:
        BS = _block(g.S, tuple(max(tile >> k, 8) for k in range(5)))  # a byte of the mask at least
        BC = min(power_of_2(g.C), max(tile // BS, 1))
    s_tiles, blocks = cdiv(g.S, BS), cdiv(g.C, BC)
    tiles = g.inner * s_tiles
    wanted = g.outer * blocks * tiles // (8 * limits.processors)  # 8 programs of 4 warps can be resident on a processor
    TILES = min(limits.max_tiles, 1 << max(wanted.bit_length() - 1, 0), power_of_2(tiles))
    chunks = cdiv(tiles, TILES)
    wide = (BC - 1) * g.sC + (BS - 1) * g.sS >= 2**31
    return Stream(BC, BS, TILES, s_tiles, tiles, chunks, g.outer * blocks * chunks, wide, _warps(p, BC * BS))


def _few_a_lane(p: Problem) -> bool:
    """Whether each value takes two registers, or has an address of its own to hold."""
    return p.dtype == torch.float64 or geometry(p).vector < 4


def _warps(p: Problem, elements: int) -> int:
    per_lane, most = (8, 32) if _few_a_lane(p) else (16, 16)
    return min(max(elements // (32 * per_lane), 1), most)


def set_tile(p: Problem, limits: Limits, backward: bool) -> SetTile | None:
    """The tile of the single pass, or None if a set does not fit or would be read by scraps of memory."""
    g = geometry(p)
    limit = limits.grad_set_tile if backward else limits.set_tile
    limit = limit // 2 if p.dtype == torch.float64 else limit
    limit = min(limit, 8192) if g.vector < 4 else limit  # 32 warps of 8 values
    if backward and p.rule == BATCH_INSTANCE and _few_a_lane(p):
        limit //= 2  # samples' coefficients take about as many registers as the values
    if p.scope == CHANNEL:
        R, S, row_stride, set_stride, per_outer = g.inner, g.S, g.C * g.S, g.sC, g.C
    else:
        R, S, row_stride, set_stride, per_outer = g.D, g.S, g.sC, g.D * g.sC, g.C // g.D
        if not g.nhwc or g.S == 1:  # sets lie end to end also across samples
            per_outer *= g.outer
    outers = g.sets // per_outer
    BR, BS = power_of_2(R), power_of_2(S)
    contiguous = R if p.scope == SAMPLE_GROUP else 1
    least = power_of_2(cdiv(64, p.dtype.itemsize * contiguous)) if g.nhwc else 1  # sets to fill 64 bytes, below which reads are slow
    BSET = min(least, power_of_2(per_outer))
    if limit < BSET * BR * BS:
        return None
    while limits.stream_tile >= 2 * BSET * BR * BS and per_outer > BSET and cdiv(per_outer, 2 * BSET) * outers >= 4 * limits.processors:
        BSET *= 2
    wide = (BSET - 1) * set_stride + (BR - 1) * row_stride + (BS - 1) * g.sS >= 2**31
    programs = cdiv(per_outer, BSET) * outers
    elements = BSET * BR * BS
    return SetTile(BSET, BR, BS, R, S, row_stride, set_stride, g.C * g.S, per_outer, programs, wide, _warps(p, elements))


def row_tile(p: Problem, limits: Limits, backward: bool) -> RowTile:
    g = geometry(p)
    limit = limits.grad_row_tile if backward else limits.row_tile
    limit = limit // 2 if p.dtype == torch.float64 else limit
    limit = min(limit, 8192) if g.vector < 4 else limit  # 32 warps of 8 values
    BC = power_of_2(g.C)
    small = min(limits.stream_tile, limit)
    if g.nhwc:
        BP = min(max(small // BC, 1), power_of_2(g.S))
        if limit < BC:
            BP, BC = 1, min(limit, 4096)
    else:
        sector = max(32 // p.dtype.itemsize, 1)
        BP = min(64, power_of_2(g.S))
        while small < BP * BC and sector < BP:
            BP //= 2
        if limit < BP * BC:
            BP = min(32, power_of_2(g.S))
            BC = max(small // BP, 1)
    blocks = cdiv(g.S, BP)
    all_blocks = g.inner * blocks
    num_warps = _warps(p, BP * BC)
    resident = limits.processors * max(16 // num_warps, 1)
    wide = (BP - 1) * g.sS + (BC - 1) * g.sC >= 2**31
    return RowTile(BP, BC, cdiv(g.C, BC), power_of_2(cdiv(all_blocks, resident)), blocks, all_blocks, wide, num_warps)


def choose_plan(p: Problem, limits: Limits, backward: bool = False, route: str | None = None) -> Plan:
    """The plan of one direction. ``route`` forces one: two_pass always can, single_pass only where the set fits."""
    g, tiles = geometry(p), stream(p, limits)
    if p.scope == POSITION:
        rows = row_tile(p, limits, backward)
        return Plan(SINGLE_PASS if rows.BLOCKS_C == 1 else TWO_PASS, g, tiles, rows=rows)
    apart = SLICES if route == SLICES or p.rule == BATCH_INSTANCE else TWO_PASS
    given = not p.batch_statistics and p.rule != BATCH_INSTANCE  # of which the samples' moments are never given
    if given or route in (TWO_PASS, SLICES) or (p.rule == RMS and p.count == 1):
        return Plan(apart, g, tiles)
    sets = set_tile(p, limits, backward)
    # a few large sets would leave most of the device idle
    worth = sets is not None and (2 * sets.programs >= limits.processors or p.count <= 4096)
    if sets is None or not (worth or route == SINGLE_PASS):
        return Plan(apart, g, tiles)
    return Plan(SINGLE_PASS, g, tiles, sets=sets)


_cached = lru_cache(maxsize=4096)(choose_plan)
_forced: list[tuple[str | None, Limits | None]] = [(None, None)]


@contextmanager
def forced(route: str | None = None, limits: Limits | None = None) -> Iterator[None]:
    """Within it every plan takes ``route`` where that is possible, and ``limits``; for tests and measurements."""
    _forced.append((route, limits))
    try:
        yield
    finally:
        _forced.pop()


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(processors=1)
    return Limits(processors=torch.cuda.get_device_properties(device).multi_processor_count)


def plan_for(p: Problem, backward: bool = False) -> Plan:
    route, limits = _forced[-1]
    return _cached(p, limits or device_limits(p.device), backward, route)
