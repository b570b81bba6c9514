"""Layers that together take every route of the kernels, at sizes of real networks, and small ones for the emulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

import normfused as nf

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [BF16, FP16, FP32, FP64]


@dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[int, str], nn.Module]  # of the channels (of rows: their length) and the backend
    shape: tuple[int, ...]
    small: tuple[int, ...]
    layout: str = "nchw"
    residual: bool = False

    def shape_on(self, device: torch.device) -> tuple[int, ...]:
        return self.shape if device.type == "cuda" else self.small

    def layer(self, device: torch.device, backend: str = "cuda", dtype: torch.dtype = FP32, seed: int = 0) -> nn.Module:
        """With parameters that are the same for every backend; float32 beside half types."""
        shape = self.shape_on(device)
        made = self.make(shape[1], backend)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
        return made.to(device, FP64 if dtype == FP64 else FP32).train()

    def tensor(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(self.shape_on(device), generator=generator, device=device).to(dtype)
        return values.movedim(1, -1).contiguous().movedim(-1, 1) if self.layout == "nhwc" else values

    def inputs(self, device: torch.device, dtype: torch.dtype = BF16, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """(x and perhaps the residual, as leaves that want gradients; dy)."""
        return (
            [self.tensor(device, dtype, 3 * seed + k).requires_grad_() for k in range(1 + self.residual)],
            self.tensor(device, dtype, 3 * seed + 2),
        )


def _groups(channels: int) -> int:
    return 32 if channels % 32 == 0 else 2


KINDS = [
    Kind("batch", lambda c, b: nf.BatchNormAct2d(c, act="silu", backend=b), (32, 256, 28, 28), (3, 6, 9, 5)),
    Kind(
        "batch+add, cumulative",
        lambda c, b: nf.BatchNormAct2d(c, act="gelu", momentum=None, backend=b),
        (32, 256, 56, 56),
        (2, 6, 33, 31),
        residual=True,
    ),
    Kind(
        "batch+add, channels last", lambda c, b: nf.BatchNormAct2d(c, act="silu", backend=b), (32, 256, 28, 28), (3, 8, 9, 5), "nhwc", True
    ),
    Kind("batch, ragged", lambda c, b: nf.BatchNormAct2d(c, backend=b), (64, 130, 7, 7), (3, 5, 7, 7)),
    Kind("group", lambda c, b: nf.GroupNormAct(_groups(c), c, act="silu", backend=b), (8, 320, 32, 32), (3, 6, 9, 5)),
    Kind(
        "group, channels last", lambda c, b: nf.GroupNormAct(_groups(c), c, act="silu", backend=b), (4, 320, 32, 32), (3, 8, 9, 5), "nhwc"
    ),
    Kind("group, large", lambda c, b: nf.GroupNormAct(2, c, act="silu", backend=b), (2, 128, 256, 256), (2, 6, 33, 31)),
    Kind("instance", lambda c, b: nf.InstanceNormAct2d(c, act="tanh", affine=True, backend=b), (8, 64, 64, 64), (3, 6, 9, 5)),
    Kind("instance, few sets", lambda c, b: nf.InstanceNormAct2d(c, act="relu", backend=b), (1, 4, 512, 512), (1, 2, 33, 31)),
    Kind("filter response", lambda c, b: nf.FilterResponseNorm2d(c, tlu=False, backend=b), (8, 64, 56, 56), (3, 6, 9, 5)),
    Kind("layer, rows", lambda c, b: nf.LayerNormAct(c, act="gelu", backend=b), (8192, 768), (19, 77)),
    Kind("layer, channels of maps", lambda c, b: nf.LayerNormAct(c, dim=1, backend=b), (16, 96, 56, 56), (3, 6, 9, 5)),
    Kind("rms, pre-norm", lambda c, b: nf.RMSNormAct(c, residual_mode="pre_norm", backend=b), (4096, 4096), (9, 120), residual=True),
]
NAMED = {kind.name: kind for kind in KINDS}


def step(layer: nn.Module, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y (and h) and every gradient."""
    out = layer(*inputs)
    heads = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(heads, [*inputs, *layer.parameters()], (dy,) * len(heads))
    return [*(h.detach() for h in heads), *gradients]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def differing(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """How many elements differ, on the device and without waiting for it; NaN differs from everything."""
    return torch.stack([(p != q).sum() for p, q in zip(a, b, strict=True)]).sum()


def moved(tensors: list[Tensor], offset: int) -> list[Tensor]:
    """The same numbers, strides and leaves, ``offset`` elements into their storage."""
    out = []
    for t in tensors:
        base = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
        view = torch.as_strided(base, t.shape, t.stride(), offset)
        assert prod(t.shape) == t.numel()
        view.copy_(t.detach())
        out.append(view.requires_grad_(t.requires_grad))
    return out
