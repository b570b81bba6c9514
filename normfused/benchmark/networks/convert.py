"""timm's ResNets, EfficientNets and ConvNeXts with normfused's layers, and what is counted of them."""

from __future__ import annotations

from torch import nn

from normfused.convert import fuse_norms
from normfused.convert.classes import TORCH_NORMS
from normfused.norms.base import NormActMixin


def fuse(model: nn.Module) -> nn.Module:
    """``model`` itself, after `fuse_norms`."""
    fuse_norms(model)
    return model


def norms_left(model: nn.Module) -> list[str]:
    """Names of the norms of ``model`` that are torch's or a subclass that is not normfused's."""
    return [name for name, m in model.named_modules() if isinstance(m, TORCH_NORMS) and not isinstance(m, NormActMixin)]


def norms_fused(model: nn.Module) -> int:
    """How many of the modules of ``model`` are layers of normfused."""
    return sum(isinstance(m, NormActMixin) for m in model.modules())
