"""Blocks whose code decides at run time what follows the norm, so that reading it proves nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .source import Fusion
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
