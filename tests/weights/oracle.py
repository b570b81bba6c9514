"""Both norms from their definitions in float64, gradients by autograd, and weights of every kind of memory order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfused.weights import Spectral, Weighted

from .conftest import DEVICE

# One rounding to nearest of the type, relative to the largest value
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ACCUMULATE = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Shape:
    sizes: tuple[int, ...]
    dim: int | None = 0
    order: tuple[int, ...] | None = None  # of the dimensions in memory, slowest first
    gaps: bool = False  # not dense

    def make(self, dtype: torch.dtype) -> Tensor:
        made = torch.randn(self.sizes, device=DEVICE).to(dtype)
        if self.order is not None:
            back = [self.order.index(d) for d in range(len(self.order))]
            made = made.permute(self.order).contiguous().permute(back)
        if self.gaps:
            made = torch.stack([made, made], -1)[..., 0]
        return made.requires_grad_()


CL2, CL3 = (0, 2, 3, 1), (0, 2, 3, 4, 1)
SHAPES = {
    "linear": Shape((8, 64)),
    "odd rows": Shape((5, 3, 3, 3)),
    "one column": Shape((50, 1)),
    "one row": Shape((1, 50)),
    "rows of a block": Shape((3, 2100)),
    "rows of a warp, many": Shape((70, 24)),
    "channels_last": Shape((6, 8, 3, 3), order=CL2),
    "channels_last_3d": Shape((4, 6, 2, 3, 2), order=CL3),
    "transposed": Shape((6, 8, 4, 4), 1),
    "transposed, one row left": Shape((3, 7, 5), 1),
    "transposed, wide kernel": Shape((5, 3, 7, 7), 1),
    "transposed, channels_last": Shape((6, 8, 3, 3), 1, order=CL2),
    "columns": Shape((7, 16), 1),
    "middle": Shape((4, 6, 3, 2), 2),
    "no known order": Shape((4, 6, 3, 2), 2, order=(3, 1, 0, 2)),
    "not dense": Shape((4, 6), 0, gaps=True),
}
WEIGHT_ONLY = {"vector": Shape((9,)), "whole": Shape((6, 5, 4), None), "scalar row": Shape((1, 1))}


def weighted(shape: Shape, dtype: torch.dtype) -> Weighted:
    v = shape.make(dtype)
    sizes = [] if shape.dim is None else [size if d == shape.dim else 1 for d, size in enumerate(shape.sizes)]
    g = (torch.rand(sizes, device=DEVICE) + 0.5).to(dtype).requires_grad_()
    return Weighted(g, v, shape.dim)


def weight_norm(request: Weighted) -> tuple[Tensor, Tensor, Tensor]:
    """w, g, v in float64."""
    g, v = (t.detach().double().requires_grad_() for t in (request.g, request.v))
    others = [d for d in range(v.dim()) if d != request.dim]
    squares = v.square()
    for d in others:
        squares = squares.sum(d, keepdim=True)
    length = squares.sqrt()
    return (g.reshape(length.shape) if request.dim is not None else g) * v / length, g, v


def spectral(shape: Shape, dtype: torch.dtype, iterations: int = 1, eps: float = 1e-12) -> Spectral:
    weight = shape.make(dtype)
    assert shape.dim is not None
    rows = shape.sizes[shape.dim]
    u, v = (torch.nn.functional.normalize(torch.randn(n, device=DEVICE), dim=0) for n in (rows, weight.numel() // rows))
    return Spectral(weight, u.to(dtype), v.to(dtype), shape.dim, iterations, eps)


def spectral_norm(request: Spectral) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, W, u, v in float64; u, v after the iterations."""
    weight = request.weight.detach().double().requires_grad_()
    matrix = weight.movedim(request.dim, 0).reshape(weight.shape[request.dim], -1)
    u, v = request.u.double(), request.v.double()
    with torch.no_grad():
        for _ in range(request.iterations):
            u = matrix @ v
            u = u / max(float(u.norm()), request.eps)
            v = matrix.t() @ u
            v = v / max(float(v.norm()), request.eps)
    return weight / (u @ matrix @ v), weight, u, v


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, terms: int, scale: float | None = None) -> None:
    """One rounding to the type, and of each of ``terms`` numbers that were summed, one to the type of accumulation, as they add up."""
    assert got.dtype == dtype
    largest = float(expected.detach().abs().max()) if scale is None else scale
    bound = (1.001 * ROUNDING[dtype] + (8 + terms**0.5) * ACCUMULATE[dtype]) * largest
    error = float((got.detach().double().cpu() - expected.detach().cpu()).abs().max())
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"
