"""Blocks whose code decides at run time what follows the norm, so that reading it proves nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .source import Fusion, Rewritten
from .swap import Swapped, derived, named, remembered, twin, without_act


class FusedConvModule(Swapped, nn.Module):
    """mmcv's ConvModule, which walks through ``order``; callers may leave out norm or activation for one call."""

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        module: Any = self
        fused = activate and norm
        for layer in module.order:
            if layer == "conv":
                if module.with_explicit_padding:
                    x = module.padding_layer(x)
                x = module.conv(x)
            elif layer == "norm" and norm:
                x = module.norm(x) if fused else without_act(module.norm, x)
            elif layer == "act" and activate and not fused:
                x = module.activate(x)
        return x


@remembered
def fused_conv_module(original: type) -> type:
    return derived(original, FusedConvModule, {}, fused_conv_module, original)


def known_block(owner: Any) -> tuple[str, Fusion, type] | None:
    """(name of the norm, fusion, the class of the block then), if ``owner`` is such a block and its norm is followed by its activation."""
    if named(type(owner)) != ("mmcv", "ConvModule") or not (owner.with_norm and owner.with_activation) or "forward" in owner.__dict__:
        return None
    order = tuple(owner.order)
    adjacent = "norm" in order and order[order.index("norm") + 1 :][:1] == ("act",)
    # folds the norm into the convolution's weight in evaluation, past the norm
    folds = getattr(owner, "efficient_conv_bn_eval_forward", None) is not None
    held = twin(owner.activate) if adjacent and not folds else None
    return None if held is None else (owner.norm_name, Fusion(held), fused_conv_module(type(owner)))


# of nnU-Net's networks: residual blocks, the name of their last unit and of the activation after the add
_RESIDUAL_BLOCKS = {
    ("dynamic_network_architectures", "BasicBlockD"): ("conv2", "nonlin2"),
    ("dynamic_network_architectures", "BottleneckD"): ("conv3", "nonlin3"),
}


class FusedResidualBlock(Rewritten):
    """The last unit's norm, a grandchild of the block, adds and activates."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        last, _ = _RESIDUAL_BLOCKS[named(type(self))]
        residual = block.skip(x)
        for unit in (block.conv1, block.conv2)[: 1 if last == "conv2" else 2]:
            x = unit(x)
        *layers, norm = getattr(block, last).all_modules
        for layer in layers:
            x = layer(x)
        return self._norm_add_act(norm, x, residual)


@remembered
def fused_residual_block(original: type) -> type:
    return derived(original, FusedResidualBlock, {}, fused_residual_block, original)


def residual_block(owner: Any) -> tuple[Any, Fusion, type] | None:
    """(the unit whose norm is the last before the add, fusion, the class of the block then), if ``owner`` is such a block and nothing
    (squeeze and excitation, stochastic depth, a hook) stands or looks between norm and add."""
    names = _RESIDUAL_BLOCKS.get(named(type(owner)))
    if names is None or owner.apply_se or owner.apply_stochastic_depth or "forward" in owner.__dict__:
        return None
    unit, act = (getattr(owner, name) for name in names)
    if not isinstance(act, nn.Module) or getattr(unit, "norm", None) is None or list(unit.all_modules)[-1] is not unit.norm:
        return None
    looks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (unit, unit.all_modules))
    held = None if looks else twin(act)
    return None if held is None else (unit, Fusion(held, residual=True), fused_residual_block(type(owner)))
