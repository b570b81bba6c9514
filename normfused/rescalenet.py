"""ResNets without normalization: torchvision's shapes, with rescaled residuals and biases before the convolutions (RescaleNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .rescale import InputBias, RescaledResidual, is_watched, normal_init_, rescale_init_

__all__ = ["RescaleBlock", "RescaleNet", "rescalenet", "rescalenet18", "rescalenet50", "rescalenet_init_"]

# (kernel size, whether the stride is here) of the branch's convolutions, and the block's width of output over its inner width
_BRANCHES: dict[str, tuple[tuple[tuple[int, bool], ...], int]] = {
    "basic": (((3, True), (3, False)), 1),
    "bottleneck": (((1, False), (3, True), (1, False)), 4),
}


class RescaleBlock(nn.Module):
    r"""Residual block without norms: :math:`\mathrm{relu}(\alpha_k\, s(x) + (m/\sqrt c)\, F(x))`.

    Before every convolution stands an `InputBias`, which also holds the ReLU of the convolution before; the multiplier is folded into
    the last convolution's weight. Where the shape changes, the shortcut s is an average pool, an `InputBias` and a 1x1 convolution.

    Args:
        kind: ``"basic"`` (two 3x3 convolutions) or ``"bottleneck"`` (1x1, 3x3, 1x1, four times as wide outside as inside).
        in_channels: channels of x.
        width: channels inside; ``width * expansion`` come out.
        index, num_blocks: of `RescaledResidual`.
        stride: of the (first) 3x3 convolution (default 1).
        groups: of the 3x3 convolutions (default 1).
        batches: of `InputBias` (default 1).
        drop: rate of channel dropout after each convolution (default 0).
        backend: None or a backend's name.

    Shape: (N, in_channels, H, W) to (N, width * expansion, H / stride, W / stride), rounded up.
    ``forward(x, biased, next_bias)``, in a chain of blocks: ``biased`` is x + the shift of ``biases[0]``, as the block before returned
    it with y for ``next_bias`` (C,), that shift. One pass writes both, and one reads both gradients.
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        width: int,
        index: int,
        num_blocks: int,
        *,
        stride: int = 1,
        groups: int = 1,
        batches: int = 1,
        drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if kind not in _BRANCHES:
            raise ValueError(f"RescaleBlock: kind must be one of {', '.join(_BRANCHES)}, got {kind!r}")
        branch, expansion = _BRANCHES[kind]
        out_channels = width * expansion
        self.drop = drop
        self.biases, self.convs = nn.ModuleList(), nn.ModuleList()
        inside = in_channels
        for i, (size, strides) in enumerate(branch):
            outside = out_channels if i == len(branch) - 1 else width
            self.biases.append(InputBias(inside, batches, "relu" if i else None, backend=backend))
            self.convs.append(
                nn.Conv2d(inside, outside, size, stride if strides else 1, size // 2, groups=groups if size > 1 else 1, bias=False)
            )
            inside = outside
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            if stride != 1:  # rounds up, as the strided convolution does
                self.shortcut.append(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
            self.shortcut.append(InputBias(in_channels, batches, backend=backend))
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.residual = RescaledResidual(index, num_blocks, backend=backend)

    def forward(self, x: Tensor, biased: Tensor | None = None, next_bias: Tensor | None = None) -> Any:
        branch = x
        last = len(self.convs) - 1
        for i, (bias, conv) in enumerate(zip(self.biases, self.convs, strict=True)):
            assert isinstance(conv, nn.Conv2d)
            branch = bias(branch) if i or biased is None else biased
            if i < last:
                branch = conv(branch)
            else:
                weight = self.residual.fold(conv.weight)
                branch = F.conv2d(branch, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            if self.drop:
                branch = F.dropout2d(branch, self.drop, self.training)
        shortcut = self.shortcut(x)
        # under autocast a branch in a half type meets a shortcut that is x itself
        return self.residual(shortcut, branch.to(shortcut.dtype), folded=True, next_bias=next_bias)


class RescaleNet(nn.Module):
    """A ResNet of `RescaleBlock`; see `rescalenet` for the arguments."""

    def __init__(
        self,
        layers: Sequence[int],
        kind: str,
        *,
        num_classes: int,
        in_channels: int,
        stem: str,
        width: int,
        groups: int,
        batches: int,
        drop_conv: float,
        drop_fc: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "small"):
            raise ValueError(f"rescalenet: stem must be 'imagenet' or 'small', got {stem!r}")
        if isinstance(layers, int) or not layers or min(layers) < 1:
            raise ValueError(f"rescalenet: layers must hold the number of blocks of each stage, at least 1, got {layers}")
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bias1 = InputBias(width, batches, "relu", act_last=True, backend=backend)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        num_blocks, index, channels = sum(layers), 0, width
        self.stages = nn.Sequential()
        for i, depth in enumerate(layers):
            stage = nn.Sequential()
            for j in range(depth):
                block = RescaleBlock(
                    kind, channels, width * 2**i, index, num_blocks, stride=2 if i and not j else 1, groups=groups, batches=batches,
                    drop=drop_conv if i >= len(layers) - 2 else 0.0, backend=backend,
                )  # fmt: skip
                stage.append(block)
                channels, index = width * 2**i * _BRANCHES[kind][1], index + 1
            self.stages.append(stage)
        self.bias2, self.drop = InputBias(channels, batches, backend=backend), nn.Dropout(drop_fc)
        self.fc = nn.Linear(channels, num_classes)
        rescalenet_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self._through_blocks(self.maxpool(self.bias1(self.conv1(x)))).mean((2, 3))
        y: Tensor = self.fc(self.drop(x))
        return y

    def _through_blocks(self, x: Tensor) -> Any:
        """``bias2(stages(x))``; where nobody waits for the calls between, a block's end also adds the bias that comes next."""
        stages = [self.stages, *self.stages]
        blocks = [block for stage in self.stages for block in cast(nn.Sequential, stage)]
        if any(type(m) is not nn.Sequential or is_watched(m) for m in stages) or any(type(m) is not RescaleBlock for m in blocks):
            return self.bias2(self.stages(x))
        biased = None
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            bias = self.bias2 if following is None else cast(InputBias, cast(RescaleBlock, following).biases[0])
            alone = is_watched(block) or (following is not None and is_watched(following))
            next_bias = None if alone else bias.next_bias(x.dtype)
            given = (x,) if biased is None else (x, biased)  # hooks see the one argument
            x, biased = (block(*given), None) if next_bias is None else block(x, biased, next_bias)
        return self.bias2(x) if biased is None else biased


def rescalenet(
    layers: Sequence[int] = (2, 2, 2, 2),
    kind: str = "basic",
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: str = "imagenet",
    width: int = 64,
    groups: int = 1,
    batches: int = 1,
    drop_conv: float = 0.0,
    drop_fc: float = 0.0,
    backend: str | None = None,
) -> RescaleNet:
    """A ResNet without normalization, initialized (`rescalenet_init_`).

    Args:
        layers: number of blocks of each stage; (2, 2, 2, 2) makes a ResNet-18, (3, 4, 6, 3) a ResNet-34 or -50.
        kind: ``"basic"`` or ``"bottleneck"``.
        num_classes, in_channels: of the classifier and of the images.
        stem: ``"imagenet"`` (7x7 convolution with stride 2 and max pooling, as torchvision's) or ``"small"`` (3x3 with stride 1).
        width: channels of the first stage; each stage has twice as many as the one before.
        groups: of the 3x3 convolutions.
        batches: how many first batches the input biases are measured over (`InputBias`).
        drop_conv: rate of channel dropout after the convolutions of the last two stages.
        drop_fc: rate of dropout before the classifier.
        backend: None or a backend's name, for all its layers.

    Returns:
        `RescaleNet`, a module from (N, in_channels, H, W) to (N, num_classes). Train it with `rescale_parameter_groups`.

    Raises:
        ValueError: unknown kind or stem, no blocks.

    Reference: Shao et al., *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
    """
    if kind not in _BRANCHES:
        raise ValueError(f"rescalenet: kind must be one of {', '.join(_BRANCHES)}, got {kind!r}")
    return RescaleNet(
        layers, kind, num_classes=num_classes, in_channels=in_channels, stem=stem, width=width, groups=groups, batches=batches,
        drop_conv=drop_conv, drop_fc=drop_fc, backend=backend,
    )  # fmt: skip


def rescalenet18(**options: Any) -> RescaleNet:
    """`rescalenet` with the blocks of a ResNet-18."""
    return rescalenet((2, 2, 2, 2), "basic", **options)


def rescalenet50(**options: Any) -> RescaleNet:
    """`rescalenet` with the blocks of a ResNet-50."""
    return rescalenet((3, 4, 6, 3), "bottleneck", **options)


def rescalenet_init_(model: nn.Module) -> nn.Module:
    """Initialize a network of `RescaleBlock` in place: branches by `rescale_init_`, shortcuts and the classifier with gain 1, the stem
    with He's; multipliers 1, input biases 0 and to be measured anew. Returns the model."""
    branches: set[nn.Module] = set()
    for block in (m for m in model.modules() if isinstance(m, RescaleBlock)):
        residual = block.residual
        rescale_init_(block.convs, residual.index, residual.num_blocks, c=residual.c, drop=block.drop)
        branches |= set(block.convs)
        for layer in block.shortcut:
            if isinstance(layer, nn.Conv2d):
                normal_init_(layer, 1.0)
                branches.add(layer)
    for m in model.modules():
        if isinstance(m, (InputBias, RescaledResidual)):
            m.reset_parameters()
        elif isinstance(m, nn.Conv2d) and m not in branches:
            normal_init_(m, 2.0)
        elif isinstance(m, nn.Linear):
            normal_init_(m, 1.0)
    return model
