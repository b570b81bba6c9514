"""Weight norm and spectral norm of many weights (normfused/backends/weights.py): host code and kernels.

    weight norm      weight_norm_kernel           a program a row     read v, write w
                     weight_norm_backward_kernel  a program a row     read dw, v, write dv
    spectral norm    matvec_kernel                a program a row     t = W v                                read W
                     transposed_matvec_kernel     COLUMNS columns     u = t/max(|t|, eps), s = W' u          read W
                     scale_kernel                 CHUNK elements      v = s/max(|s|, eps), w = W/sigma       read W, write w
                     inner_product_kernel         CHUNK elements      sums of dw*W                           read dw, W
                     spectral_gradient_kernel     CHUNK elements      dW = (dw - <dw, W>/sigma*u v')/sigma   read dw, write dW

The table of weights comes with the launch as tuples of addresses and sizes; a program looks its weight up by selects, two instructions
a weight and column of the table. Of a row the first BLOCK elements stay on chip, what follows is read twice by weight norm. All
sums have a fixed order, and nothing is copied to the device, so graphs may capture the launches. A launch holds 48 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import accumulation_dtype
from ..weights import View, of_used
from .launch import launch, on_device_of
from .tiles import get, put

__all__ = ["spectral_norm", "spectral_norm_backward", "weight_norm", "weight_norm_backward"]

_WEIGHTS = 48  # of a launch: 4 KB of arguments hold 60, and compiling takes longer with each
_BLOCK, _CHUNK, _COLUMNS, _ROWS = 1024, 8192, 64, 32  # unmeasured
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


# ------------------------------------------------------------------------------------------------------------------ kernels
@triton.jit
def pick(values, firsts, COUNT: tl.constexpr):
    """The value of this program's weight: the last whose first program is not after this one."""
    program = tl.program_id(0)
    found = program.to(tl.int64) * 0 + values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(program >= firsts[i], values[i], found)
    return found


@triton.jit
def pick_pointer(addresses, firsts, COUNT: tl.constexpr, T: tl.constexpr):
    program = tl.program_id(0)
    found = addresses[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(program >= firsts[i], addresses[i], found)
    return found.to(tl.int64).to(tl.pointer_type(T))


@triton.jit
def in_memory(m, r, A, R, B):
    """Offset of column m of row r."""
    a = m // B
    return (a * R + r) * B + (m - a * B)


@triton.jit
def in_torch(m, columns, period):
    """The number that torch gives column m."""
    divisor = tl.maximum(period, 1)
    return tl.where(period > 0, m % divisor * (columns // divisor) + m // divisor, m)


@triton.jit
def weight_norm_kernel(
    v_table, g_table, w_table, firsts, As, Rs, Bs, first_rows, norms,
    COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    v, g, w = pick_pointer(v_table, firsts, COUNT, T), pick_pointer(g_table, firsts, COUNT, T), pick_pointer(w_table, firsts, COUNT, T)
    A, R, B = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT)
    r = tl.program_id(0) - pick(firsts, firsts, COUNT)
    columns = A * B
    m = tl.arange(0, BLOCK)
    held = get(v + in_memory(m, r, A, R, B), m < columns, ACC)
    squares = held * held
    for start in range(BLOCK, columns, BLOCK):
        value = get(v + in_memory(start + m, r, A, R, B), start + m < columns, ACC)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 0))
    scale = tl.load(g + r).to(ACC) / norm
    tl.store(norms + pick(first_rows, firsts, COUNT) + r, norm)
    put(w + in_memory(m, r, A, R, B), held * scale, m < columns)
    for start in range(BLOCK, columns, BLOCK):
        at, inside = in_memory(start + m, r, A, R, B), start + m < columns
        put(w + at, get(v + at, inside, ACC) * scale, inside)


@triton.jit
def weight_norm_backward_kernel(
    dw_table, v_table, g_table, dg_table, dv_table, firsts, As, Rs, Bs, first_rows, norms,
    COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dw, v, g = pick_pointer(dw_table, firsts, COUNT, T), pick_pointer(v_table, firsts, COUNT, T), pick_pointer(g_table, firsts, COUNT, T)
    dg, dv = pick_pointer(dg_table, firsts, COUNT, T), pick_pointer(dv_table, firsts, COUNT, T)
    A, R, B = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT)
    r = tl.program_id(0) - pick(firsts, firsts, COUNT)
    columns = A * B
    m = tl.arange(0, BLOCK)
    at, inside = in_memory(m, r, A, R, B), m < columns
    held_dw, held_v = get(dw + at, inside, ACC), get(v + at, inside, ACC)
    products = held_dw * held_v
    for start in range(BLOCK, columns, BLOCK):
        at_start, within = in_memory(start + m, r, A, R, B), start + m < columns
        products += get(dw + at_start, within, ACC) * get(v + at_start, within, ACC)
    norm = tl.load(norms + pick(first_rows, firsts, COUNT) + r)
    slope = tl.sum(products, 0) / norm
    p = tl.load(g + r).to(ACC) / norm
    q = -p * slope / norm
    put(dg + r, slope, r >= 0)
    put(dv + at, p * held_dw + q * held_v, inside)
    for start in range(BLOCK, columns, BLOCK):
        at_start, within = in_memory(start + m, r, A, R, B), start + m < columns
        put(dv + at_start, p * get(dw + at_start, within, ACC) + q * get(v + at_start, within, ACC), within)


@triton.jit
def norm_of(values, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The 2-norm of numbers in memory."""
    i = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK):
        value = tl.load(values + start + i, mask=start + i < count, other=0.0)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def at_least(length, eps):
    return tl.where(length < eps, eps, length)  # NaN stays, as in torch's clamp_min


@triton.jit
def matvec_kernel(
    weight_table, v_table, firsts, As, Rs, Bs, periods, first_rows, first_columns, t, s, eps,
    GIVEN: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight, v = pick_pointer(weight_table, firsts, COUNT, T), pick_pointer(v_table, firsts, COUNT, T)
    A, R, B, period = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT), pick(periods, firsts, COUNT)
    r = tl.program_id(0) - pick(firsts, firsts, COUNT)
    columns = A * B
    s += pick(first_columns, firsts, COUNT)
    i = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], ACC)
    for start in range(0, columns, BLOCK):
        m, inside = start + i, start + i < columns
        value = get(weight + in_memory(m, r, A, R, B), inside, ACC)
        if GIVEN:
            products += value * get(v + in_torch(m, columns, period), inside, ACC)
        else:
            products += value * tl.load(s + m, mask=inside, other=0.0)
    product = tl.sum(products, 0)
    if not GIVEN:
        product = product / at_least(norm_of(s, columns, ACC, BLOCK), tl.full([], eps, ACC))
    tl.store(t + pick(first_rows, firsts, COUNT) + r, product)


@triton.jit
def transposed_matvec_kernel(
    weight_table, u_table, firsts, As, Rs, Bs, first_rows, first_columns, t, s, used_u, eps,
    COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    weight, u = pick_pointer(weight_table, firsts, COUNT, T), pick_pointer(u_table, firsts, COUNT, T)
    A, R, B = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT)
    block = tl.program_id(0) - pick(firsts, firsts, COUNT)
    columns = A * B
    first_row = pick(first_rows, firsts, COUNT)
    t += first_row
    length = at_least(norm_of(t, R, ACC, BLOCK), tl.full([], eps, ACC))
    m = block * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    products = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, R, ROWS):
        r = start + i
        inside = (r < R)[:, None] & (m < columns)[None, :]
        value = get(weight + in_memory(m[None, :], r[:, None], A, R, B), inside, ACC)
        products += value * (tl.load(t + r, mask=r < R, other=0.0) / length)[:, None]
    tl.store(s + pick(first_columns, firsts, COUNT) + m, tl.sum(products, 0), mask=m < columns)
    if block == 0:
        j = tl.arange(0, BLOCK)
        for start in range(0, R, BLOCK):
            value = tl.load(t + start + j, mask=start + j < R, other=0.0) / length
            tl.store(used_u + first_row + start + j, value, mask=start + j < R)
            put(u + start + j, value, start + j < R)


@triton.jit
def scale_kernel(
    weight_table, u_table, v_table, w_table, firsts, As, Rs, Bs, periods, first_rows, first_columns, numbers, t, s,
    used_u, used_v, sigmas, eps,
    ITERATES: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    weight, w = pick_pointer(weight_table, firsts, COUNT, T), pick_pointer(w_table, firsts, COUNT, T)
    u, v = pick_pointer(u_table, firsts, COUNT, T), pick_pointer(v_table, firsts, COUNT, T)
    A, R, B, period = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT), pick(periods, firsts, COUNT)
    chunk = tl.program_id(0) - pick(firsts, firsts, COUNT)
    columns = A * B
    first_row, first_column = pick(first_rows, firsts, COUNT), pick(first_columns, firsts, COUNT)
    i = tl.arange(0, BLOCK)
    length = tl.full([], 1.0, ACC)
    if ITERATES:
        norm = norm_of(s + first_column, columns, ACC, BLOCK)
        length = at_least(norm, tl.full([], eps, ACC))
        sigma = norm * (norm / length)
    else:
        products = tl.zeros([BLOCK], ACC)
        for start in range(0, R, BLOCK):
            inside = start + i < R
            products += get(u + start + i, inside, ACC) * tl.load(t + first_row + start + i, mask=inside, other=0.0)
        sigma = tl.sum(products, 0)
    if chunk == 0:
        tl.store(sigmas + pick(numbers, firsts, COUNT), sigma)
        for start in range(0, columns, BLOCK):
            m, inside = start + i, start + i < columns
            if ITERATES:
                value = tl.load(s + first_column + m, mask=inside, other=0.0) / length
                put(v + in_torch(m, columns, period), value, inside)
                tl.store(used_v + first_column + in_torch(m, columns, period), value, mask=inside)
            else:
                tl.store(used_v + first_column + m, get(v + m, inside, ACC), mask=inside)
        if not ITERATES:
            for start in range(0, R, BLOCK):
                tl.store(used_u + first_row + start + i, get(u + start + i, start + i < R, ACC), mask=start + i < R)
    numel = columns * R
    for start in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + start + i
        put(w + at, get(weight + at, at < numel, ACC) / sigma, at < numel)


@triton.jit
def inner_product_kernel(
    dw_table, weight_table, firsts, numels, sums,
    COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    dw, weight = pick_pointer(dw_table, firsts, COUNT, T), pick_pointer(weight_table, firsts, COUNT, T)
    numel = pick(numels, firsts, COUNT)
    chunk = tl.program_id(0) - pick(firsts, firsts, COUNT)
    products = tl.zeros([BLOCK], ACC)
    for start in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + start + tl.arange(0, BLOCK)
        products += get(dw + at, at < numel, ACC) * get(weight + at, at < numel, ACC)
    tl.store(sums + tl.program_id(0), tl.sum(products, 0))


@triton.jit
def spectral_gradient_kernel(
    dw_table, dweight_table, firsts, As, Rs, Bs, periods, first_rows, first_columns, numbers, sums, used_u, used_v, sigmas,
    COUNT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    dw, dweight = pick_pointer(dw_table, firsts, COUNT, T), pick_pointer(dweight_table, firsts, COUNT, T)
    A, R, B, period = pick(As, firsts, COUNT), pick(Rs, firsts, COUNT), pick(Bs, firsts, COUNT), pick(periods, firsts, COUNT)
    first = pick(firsts, firsts, COUNT)
    chunk = tl.program_id(0) - first
    columns = A * B
    numel = columns * R
    i = tl.arange(0, BLOCK)
    terms = tl.zeros([BLOCK], ACC)
    chunks = tl.cdiv(numel, CHUNK)
    for start in range(0, chunks, BLOCK):
        terms += tl.load(sums + first + start + i, mask=start + i < chunks, other=0.0)
    p = 1.0 / tl.load(sigmas + pick(numbers, firsts, COUNT))
    q = -tl.sum(terms, 0) * p * p
    used_u += pick(first_rows, firsts, COUNT)
    used_v += pick(first_columns, firsts, COUNT)
    for start in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + start + i
        inside = at < numel
        run = at // B
        a = run // R
        m = a * B + (at - run * B)
        row = tl.load(used_u + (run - a * R), mask=inside, other=0.0)
        column = tl.load(used_v + in_torch(m, columns, period), mask=inside, other=0.0)
        put(dweight + at, p * get(dw + at, inside, ACC) + q * row * column, inside)


# -------------------------------------------------------------------------------------------------------------- host code
class _Table:
    """Up to _WEIGHTS weights, as the arguments of launches."""

    def __init__(self, views: Sequence[View], first: int, first_row: int, first_column: int, dtype: torch.dtype) -> None:
        self.views, self.first = views, first
        self.As, self.Rs, self.Bs = tuple(v.A for v in views), tuple(v.R for v in views), tuple(v.B for v in views)
        self.periods = tuple(v.period for v in views)
        self.numels = tuple(v.numel for v in views)
        self.first_rows = _before(self.Rs, first_row)
        self.first_columns = _before([v.columns for v in views], first_column)
        self.numbers = tuple(range(first, first + len(views)))
        self.constants = {"COUNT": len(views), "T": _TYPES[dtype], "ACC": _TYPES[accumulation_dtype(dtype)], "BLOCK": _BLOCK}

    def of(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in tensors[self.first : self.first + len(self.views)])

    def launch(self, kernel: Any, programs_of: Callable[[View], int], tables: Sequence[Any], *others: Any, **constants: Any) -> None:
        """The kernel's arguments are ``tables`` of addresses, the first program of each weight, and what follows."""
        programs = [programs_of(view) for view in self.views]
        launch(kernel, sum(programs), *tables, _before(programs), *others, **self.constants, **constants)


def _before(sizes: Sequence[int], first: int = 0) -> tuple[int, ...]:
    found = [first]
    for size in sizes[:-1]:
        found.append(found[-1] + size)
    return tuple(found)


def _tables(views: Sequence[View], dtype: torch.dtype) -> list[_Table]:
    found, row, column = [], 0, 0
    for first in range(0, len(views), _WEIGHTS):
        part = views[first : first + _WEIGHTS]
        found.append(_Table(part, first, row, column, dtype))
        row += sum(view.R for view in part)
        column += sum(view.columns for view in part)
    return found


def _rows(view: View) -> int:
    return view.R


def _chunks(view: View) -> int:
    return -(-view.numel // _CHUNK)


def _columns(view: View) -> int:
    return -(-view.columns // _COLUMNS)


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=accumulation_dtype(like.dtype), device=like.device)


def weight_norm(views: Sequence[View], gs: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    weights = [torch.empty_like(v) for v in vs]
    norms = _numbers(sum(view.R for view in views), vs[0])
    with on_device_of(vs[0]):
        for x in _tables(views, vs[0].dtype):
            x.launch(weight_norm_kernel, _rows, (x.of(vs), x.of(gs), x.of(weights)), x.As, x.Rs, x.Bs, x.first_rows, norms)
    return weights, (norms,)


def weight_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], gs: Sequence[Tensor], vs: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dgs: list[Tensor | None] = [None] * len(views)
    dvs: list[Tensor | None] = [None] * len(views)
    used = [i for i, dw in enumerate(dweights) if dw is not None]
    norms = of_used(saved[0], [view.R for view in views], used)
    dws, used_vs, used_gs = [dweights[i] for i in used], [vs[i] for i in used], [gs[i] for i in used]
    found_dgs, found_dvs = [torch.empty_like(g) for g in used_gs], [torch.empty_like(v) for v in used_vs]
    with on_device_of(vs[0]):
        for x in _tables([views[i] for i in used], vs[0].dtype):
            tables = [x.of(tensors) for tensors in (dws, used_vs, used_gs, found_dgs, found_dvs)]
            x.launch(weight_norm_backward_kernel, _rows, tables, x.As, x.Rs, x.Bs, x.first_rows, norms)
    for i, dg, dv in zip(used, found_dgs, found_dvs, strict=True):
        dgs[i], dvs[i] = dg, dv
    return dgs, dvs


def spectral_norm(
    views: Sequence[View], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    normalised = [torch.empty_like(weight) for weight in weights]
    rows, columns = sum(view.R for view in views), sum(view.columns for view in views)
    t, s, used_u, used_v, sigmas = (_numbers(n, weights[0]) for n in (rows, columns, rows, columns, len(views)))
    with on_device_of(weights[0]):
        for x in _tables(views, weights[0].dtype):
            weight, u, v, w = x.of(weights), x.of(us), x.of(vs), x.of(normalised)
            sizes, starts = (x.As, x.Rs, x.Bs), (x.first_rows, x.first_columns)
            for i in range(max(iterations, 1)):
                x.launch(matvec_kernel, _rows, (weight, v), *sizes, x.periods, *starts, t, s, eps, GIVEN=i == 0)
                if iterations:
                    others = (*sizes, *starts, t, s, used_u, eps)
                    x.launch(transposed_matvec_kernel, _columns, (weight, u), *others, COLUMNS=_COLUMNS, ROWS=_ROWS)
            others = (*sizes, x.periods, *starts, x.numbers, t, s, used_u, used_v, sigmas, eps)
            x.launch(scale_kernel, _chunks, (weight, u, v, w), *others, ITERATES=iterations > 0, CHUNK=_CHUNK)
    return normalised, (used_u, used_v, sigmas)


def spectral_norm_backward(
    views: Sequence[View], dweights: Sequence[Tensor | None], weights: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * len(views)
    used = [i for i, dw in enumerate(dweights) if dw is not None]
    part = [views[i] for i in used]
    u = of_used(saved[0], [view.R for view in views], used)
    v = of_used(saved[1], [view.columns for view in views], used)
    sigmas = of_used(saved[2], [1] * len(views), used)
    dws, used_weights = [dweights[i] for i in used], [weights[i] for i in used]
    found = [torch.empty_like(weight) for weight in used_weights]
    sums = _numbers(sum(map(_chunks, part)), weights[0])
    with on_device_of(weights[0]):
        for x in _tables(part, weights[0].dtype):
            dw = x.of(dws)
            x.launch(inner_product_kernel, _chunks, (dw, x.of(used_weights)), x.numels, sums, CHUNK=_CHUNK)
            others = (x.As, x.Rs, x.Bs, x.periods, x.first_rows, x.first_columns, x.numbers, sums, u, v, sigmas)
            x.launch(spectral_gradient_kernel, _chunks, (dw, x.of(found)), *others, CHUNK=_CHUNK)
    for i, gradient in zip(used, found, strict=True):
        gradients[i] = gradient
    return gradients
