"""Networks that need nothing but torch. Each takes a factory for its norms, so that torch.nn's and normfused's are the same network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layers


# ----------------------------------------------------------------------------------------------------- diffusion U-Net
class _TimedBlock(nn.Module):
    """norm, SiLU, convolution, twice, with the time added between, and a shortcut around."""

    def __init__(self, inside: int, outside: int, time: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers(inside, "silu")
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2 = layers(outside, "silu")
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x)) + self.time(time)[:, :, None, None]
        y: Tensor = self.shortcut(x) + self.conv2(self.norm2(h))
        return y


class DiffusionUNet(nn.Module):
    """The residual blocks, skips and time embedding of Stable Diffusion's U-Net, without its attention.

    Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752: 320 channels times 1, 2, 4, 4,
    two blocks a level down and three up, GroupNorm(32) + SiLU. Input (N, 4, H, W) and times (N,); output like the input.
    """

    def __init__(self, layers: Layers, width: int = 320, factors: Sequence[int] = (1, 2, 4, 4), blocks: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.width = width
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, now = [width], width
        for level, factor in enumerate(factors):
            for _ in range(blocks):
                self.down.append(_TimedBlock(now, width * factor, time, layers))
                now = width * factor
                kept.append(now)
            if level < len(factors) - 1:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                kept.append(now)
        self.middle = nn.ModuleList(_TimedBlock(now, now, time, layers) for _ in range(2))
        for level, factor in reversed(list(enumerate(factors))):
            for _ in range(blocks + 1):
                self.up.append(_TimedBlock(now + kept.pop(), width * factor, time, layers))
                now = width * factor
            if level > 0:
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.norm = layers(now, "silu")
        self.last = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / half))
        angles = times[:, None] * frequencies
        time = self.time(torch.cat((angles.cos(), angles.sin()), 1).to(x.dtype))
        x = self.first(x)
        kept = [x]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, _TimedBlock) else layer(x)
            kept.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            if isinstance(layer, _TimedBlock):
                x = layer(torch.cat((x, kept.pop()), 1), time)
            else:
                x = layer(F.interpolate(x, scale_factor=2.0))
        y: Tensor = self.last(self.norm(x))
        return y


# ------------------------------------------------------------------------------------------------------------- nnU-Net
class _Stage(nn.Sequential):
    """Two times 3x3x3 convolution, norm, leaky ReLU; the first convolution has the stride."""

    def __init__(self, inside: int, outside: int, stride: int, layers: Layers) -> None:
        super().__init__(
            nn.Conv3d(inside, outside, 3, stride, 1), layers(outside, "leaky_relu"),
            nn.Conv3d(outside, outside, 3, 1, 1), layers(outside, "leaky_relu"),
        )  # fmt: skip


class NnUNet(nn.Module):
    """nnU-Net's plain 3-D network ("3d_fullres"), one output, no deep supervision.

    Isensee et al., *nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation*, Nature Methods 2021:
    instance norm and leaky ReLU, strided convolutions down, transposed ones up. Input (N, 1, D, H, W), output (N, classes, D, H, W).
    """

    def __init__(self, layers: Layers, widths: Sequence[int] = (32, 64, 128, 256, 320, 320), classes: int = 3) -> None:
        super().__init__()
        inside = (1, *widths)
        self.down = nn.ModuleList(_Stage(inside[i], width, 1 if i == 0 else 2, layers) for i, width in enumerate(widths))
        self.widen, self.up = nn.ModuleList(), nn.ModuleList()
        for above, below in reversed(list(pairwise(widths))):
            self.widen.append(nn.ConvTranspose3d(below, above, 2, 2))
            self.up.append(_Stage(2 * above, above, 1, layers))
        self.last = nn.Conv3d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        kept.pop()
        for widen, stage in zip(self.widen, self.up, strict=True):
            x = stage(torch.cat((widen(x), kept.pop()), 1))
        y: Tensor = self.last(x)
        return y


# ------------------------------------------------------------------------------------------------------------ CycleGAN
class _ReflectedBlock(nn.Module):
    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3), layers(width, "relu")
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3), layers(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.conv2(self.pad(self.norm1(self.conv1(self.pad(x))))), x)
        return y


class CycleGanGenerator(nn.Sequential):
    """The generator of CycleGAN for 256 x 256 images: two strided convolutions, nine residual blocks, two transposed convolutions.

    Zhu et al., *Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks*, arXiv 1703.10593: instance norm
    without weights, ReLU, reflected borders. Input and output (N, 3, H, W).
    """

    def __init__(self, layers: Layers, width: int = 64, blocks: int = 9) -> None:
        w = width
        super().__init__(
            nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), layers(w, "relu"),
            nn.Conv2d(w, 2 * w, 3, 2, 1), layers(2 * w, "relu"), nn.Conv2d(2 * w, 4 * w, 3, 2, 1), layers(4 * w, "relu"),
            *(_ReflectedBlock(4 * w, layers) for _ in range(blocks)),
            nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1), layers(2 * w, "relu"),
            nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1), layers(w, "relu"),
            nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh(),
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- ResNet
class _Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int, layers: Layers, act: str) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inside, width, 1, bias=False), layers(width, act)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), layers(width, act)
        self.conv3, self.norm3 = nn.Conv2d(width, outside, 1, bias=False), layers(outside, act)
        keeps = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if keeps else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), layers(outside))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(x)))))
        y: Tensor = self.norm3(h, self.shortcut(x))
        return y


class ResNet(nn.Sequential):
    """ResNet of bottleneck blocks with any norm and activation; the defaults are ResNet-50's.

    He et al., *Deep Residual Learning for Image Recognition*, arXiv 1512.03385 (the stride on the 3x3 convolution).
    Input (N, 3, H, W), output (N, classes).
    """

    def __init__(self, layers: Layers, act: str, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        blocks, inside = [], width
        for level, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(_Bottleneck(inside, width << level, 2 if level and not i else 1, layers, act))
                inside = 4 * (width << level)
        super().__init__(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), layers(width, act), nn.MaxPool2d(3, 2, 1),
            *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes),
        )  # fmt: skip
