"""timm's ResNets, EfficientNets and ConvNeXts with normfused's layers, until the package has a general conversion.

Modules are told by their class's name and their children, so that nothing of timm is imported. Names, parameters and buffers stay as
they are: state dicts of both forms are interchangeable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import normfused as nf
from normfused.norms.base import NormActMixin

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# of timm's residual blocks: children that stand between the norms and the activations if they are more than a placeholder
_BETWEEN = ("drop_block", "aa", "se", "drop_path")
_BLOCKS = {"BasicBlock": 2, "Bottleneck": 3}


class ResidualBlock(nn.Module):
    """timm's BasicBlock or Bottleneck; each norm is one call with its activation, the last one with the shortcut too."""

    def __init__(self, block: Any, convolutions: int) -> None:
        super().__init__()
        for name in _BETWEEN:
            if not isinstance(getattr(block, name, None), nn.Identity | None):
                raise ValueError(f"convert.fuse: {type(block).__name__}.{name} must be absent, got {getattr(block, name)}")
        self.convolutions = convolutions
        for i in range(1, convolutions + 1):
            self.add_module(f"conv{i}", getattr(block, f"conv{i}"))
            self.add_module(f"bn{i}", _batch_norm(getattr(block, f"bn{i}"), getattr(block, f"act{i}")))
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut, last = x, self.convolutions
        for i in range(1, last):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
        x = getattr(self, f"conv{last}")(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        y: Tensor = getattr(self, f"bn{last}")(x, shortcut)
        return y


def fuse(model: nn.Module) -> nn.Module:
    """``model`` itself, its batch and layer norms replaced where they stand, with the activations and shortcuts that follow them.

    Raises:
        ValueError: a residual block with attention, drop path or the like between norm and activation.
    """
    norm, act = getattr(model, "bn1", None), getattr(model, "act1", None)
    if type(norm) is nn.BatchNorm2d and isinstance(act, nn.Module):  # ResNet's stem; EfficientNet's bn1 holds its activation
        model.bn1, model.act1 = _batch_norm(norm, act), nn.Identity()
    _replace_children(model)
    return model


def norms_left(model: nn.Module) -> list[str]:
    """Names of the norms of ``model`` that are torch's or a subclass that is not normfused's."""
    return [name for name, m in model.named_modules() if isinstance(m, _NORMS) and not isinstance(m, NormActMixin)]


def norms_fused(model: nn.Module) -> int:
    """How many of the modules of ``model`` are layers of normfused."""
    return sum(isinstance(m, NormActMixin) for m in model.modules())


def _replace_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        kind = type(child).__name__
        if kind in _BLOCKS and hasattr(child, f"act{_BLOCKS[kind]}"):
            child = ResidualBlock(child, _BLOCKS[kind])
            setattr(module, name, child)
        found = _norm(child)
        if found is None:
            _replace_children(child)
        else:
            setattr(module, name, found)


def _norm(module: Any) -> nn.Module | None:
    if isinstance(module, NormActMixin):
        return None
    if isinstance(module, nn.BatchNorm2d):
        if not isinstance(getattr(module, "drop", None), nn.Identity | None):
            raise ValueError(f"convert.fuse: {type(module).__name__}.drop must be absent, got {module.drop}")
        return _batch_norm(module, getattr(module, "act", None))
    if isinstance(module, nn.LayerNorm):
        dim = 1 if type(module).__name__ == "LayerNorm2d" else -1
        affine, bias = module.elementwise_affine, module.bias is not None
        shape: Any = module.normalized_shape
        return _with_state(nf.LayerNormAct(shape, module.eps, affine, bias, dim=dim), module)
    return None


def _batch_norm(norm: nn.BatchNorm2d, act: nn.Module | None) -> nn.Module:
    act = None if isinstance(act, nn.Identity) else act
    fused = nf.BatchNormAct2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, act=act)
    return _with_state(fused, norm)


def _with_state(fused: nn.Module, norm: nn.Module) -> nn.Module:
    fused.load_state_dict(norm.state_dict(), assign=True)
    return fused.train(norm.training)
