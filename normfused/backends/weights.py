"""How a weight is seen by the kernels that normalise it, and what a backend offers for them.

A weight whose rows are counted along ``dim`` lies in memory as (A, R, B): element (a, r, b) at (a*R + r)*B + b, where r is its row. Any
dense tensor can be seen so, whatever the order of its dimensions. Its matrix is (R, A*B); *column* m = a*B + b counts in the order of
memory.

==========================================  ====  ===  ==========
weight                                      A     R    B
==========================================  ====  ===  ==========
linear, embedding, convolution; dim 0       1     out  the rest
transposed convolution, contiguous; dim 1   in    out  kernel
the same in channels_last                   in*k  out  1
any; dim None                               1     1    all
==========================================  ====  ===  ==========

torch numbers the columns of a spectral norm's ``v`` in the order of the sizes. Where memory has the first of them innermost
(channels_last), column m of memory is ``m % period * (columns // period) + m // period`` of v; ``period`` is 0 where the orders agree.

``backends.{torch,triton,cuda}.weights`` have, each over any number of weights of one device and type (``views`` one per weight):

``weight_norm(views, gs, vs) -> (weights, saved)``
``weight_norm_backward(views, dweights, gs, vs, saved) -> (dgs, dvs)``
``spectral_norm(views, weights, us, vs, iterations, eps) -> (normalised, saved)``
    ``iterations`` 0: u and v as they are. Else ``us`` and ``vs`` are updated in place. ``saved`` is (u, v, sigma): the vectors used, of
    all weights one after the other, v in torch's order, and a sigma per weight, all in the type of accumulation.
``spectral_norm_backward(views, dweights, weights, saved) -> dweights_of_the_parameters``

Weights are dense, ``dweights`` lie as they do (an entry may be None: nothing is needed there), g, u and v are contiguous and of the
weight's type. What is returned is new and lies as its weight does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["View", "of_used", "view_of"]

LARGEST = 2**31 - 1  # elements of a weight: kernels count them in 32 bits


class View(NamedTuple):
    dim: int | None
    A: int
    R: int
    B: int
    period: int

    @property
    def columns(self) -> int:
        return self.A * self.B

    @property
    def numel(self) -> int:
        return self.A * self.R * self.B


def view_of(weight: Tensor, dim: int | None, ordered: bool = False) -> View | None:
    """How ``weight`` is seen, None if it is not dense or empty.

    Args:
        dim: along which rows are counted, not negative; None: all of it is one row.
        ordered: whether the order of columns matters; then it must be that of the sizes, or ``period`` must tell it.
    """
    return _view(tuple(weight.shape), weight.stride(), dim, ordered)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], dim: int | None, ordered: bool) -> View | None:
    in_memory = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[d])
    numel = 1
    for d in reversed(in_memory):
        if strides[d] != numel:
            return None
        numel *= shape[d]
    if numel == 0 or numel > LARGEST:
        return None
    rows = 1 if dim is None else shape[dim]
    inner = strides[dim] if dim is not None and rows != 1 else numel
    rest = [d for d in in_memory if d != dim]
    order = sorted(rest)
    period = 0
    if ordered and rest != order:
        if rest != [*order[1:], order[0]]:
            return None
        period = shape[order[0]]
    return View(dim, numel // (rows * inner), rows, inner, period)


def of_used(values: Tensor, sizes: Sequence[int], used: Sequence[int]) -> Tensor:
    """Of the values of all weights, one after the other, those of some: a copy only where some are left out."""
    if len(used) == len(sizes):
        return values
    if not used:
        return values[:0]
    parts = values.split(list(sizes))
    return torch.cat([parts[i] for i in used])
