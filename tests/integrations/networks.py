"""Networks with the constructors of nnU-Net's: layers come as classes and keyword arguments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn


class Unit(nn.Module):
    """Convolution, norm and activation, each under two names; no activation where ``nonlin`` is None."""

    def __init__(
        self, conv_op: Any, inside: int, outside: int, norm_op: Any, norm_op_kwargs: Any, nonlin: Any, nonlin_kwargs: Any, first: bool
    ) -> None:
        super().__init__()
        self.conv = conv_op(inside, outside, 3, padding=1)
        self.norm = norm_op(outside, **norm_op_kwargs)
        layers = [self.conv, self.norm]
        if nonlin is not None:
            self.nonlin = nonlin(**nonlin_kwargs)
            layers.insert(1 if first else 2, self.nonlin)
        self.all_modules = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all_modules(x)
        return y


class PlainConvUNet(nn.Module):
    def __init__(
        self, input_channels: int, num_classes: int, features_per_stage: list[int], conv_op: Any, norm_op: Any, norm_op_kwargs: Any,
        nonlin: Any, nonlin_kwargs: Any, nonlin_first: bool = False, deep_supervision: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [input_channels, *features_per_stage]
        self.encoder = nn.Sequential(
            *(Unit(conv_op, a, b, norm_op, norm_op_kwargs, nonlin, nonlin_kwargs, nonlin_first) for a, b in pairwise(widths))
        )
        self.head = conv_op(widths[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y

    @staticmethod
    def initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, a=0.01)


class ResidualEncoderUNet(PlainConvUNet):
    """Adds its input before the last activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = kwargs["features_per_stage"][-1]
        self.last = Unit(kwargs["conv_op"], width, width, kwargs["norm_op"], kwargs["norm_op_kwargs"], None, None, False)
        self.nonlin2 = kwargs["nonlin"](**kwargs["nonlin_kwargs"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        y: Tensor = self.head(self.nonlin2(self.last(x) + x))
        return y
