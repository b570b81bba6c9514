"""Norm, activation and shortcut of the networks defined here, as torch.nn's chain or as normfused's one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

import normfused as nf
from normfused.activations import module_of

from ..providers import FRN, PlainTLU

TORCH, NORMFUSED = "torch.nn", "normfused"


class Layers(Protocol):
    """``layers(channels, act)`` is a module with ``forward(x, shortcut=None)`` = act(norm(x) + shortcut); ``act`` None is no activation."""

    def __call__(self, channels: int, act: str | None = None) -> nn.Module: ...


class Chain(nn.Module):
    """norm, add, activation one after the other, in place where networks have it so."""

    def __init__(self, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        z: Tensor = self.norm(x)
        if shortcut is not None:
            z += shortcut
        return z if self.act is None else self.act(z)


def _chain(make: Callable[[int], nn.Module]) -> Layers:
    def layer(channels: int, act: str | None = None) -> nn.Module:
        found = PlainTLU(channels) if act == "tlu" else module_of(act, channels)
        if isinstance(found, nn.ReLU | nn.LeakyReLU):
            found.inplace = True
        return Chain(make(channels), found)

    return layer


def group_norm(norms: str, groups: int = 32) -> Layers:
    if norms == TORCH:
        return _chain(lambda channels: nn.GroupNorm(groups, channels))
    return lambda channels, act=None: nf.GroupNormAct(groups, channels, act=act)


def instance_norm(norms: str, dimensions: int, *, affine: bool) -> Layers:
    plain, fused = {2: (nn.InstanceNorm2d, nf.InstanceNormAct2d), 3: (nn.InstanceNorm3d, nf.InstanceNormAct3d)}[dimensions]
    if norms == TORCH:
        return _chain(lambda channels: plain(channels, affine=affine))
    return lambda channels, act=None: fused(channels, affine=affine, act=act)


def filter_response_norm(norms: str) -> Layers:
    """With ``act="tlu"`` its threshold is learned."""
    if norms == TORCH:
        return _chain(FRN)
    return lambda channels, act=None: nf.FilterResponseNorm2d(channels, tlu=act == "tlu", act=None if act == "tlu" else act)
