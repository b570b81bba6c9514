"""All shapes that are timed, in one place.

``MATRIX`` is the full matrix, meant for a GPU in bf16; ``QUICK`` is the set that a laptop's CPU can time in float32, every norm in both
memory formats, once with 4 MB and more and once small, where the host's time is what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"


@dataclass(frozen=True)
class Case:
    """One operation: ``norm`` with ``act`` and perhaps a residual on a tensor of ``shape`` in ``dtype`` and ``layout``.

    ``groups`` belongs to group norm. For layer and RMS norm ``dim`` is -1 (rows) or 1 (channels of maps).
    """

    norm: str
    shape: tuple[int, ...]
    act: str = "identity"
    residual: str | None = None
    groups: int = 1
    dim: int = -1
    dtype: torch.dtype = torch.bfloat16
    layout: str = CONTIGUOUS
    family: str = ""
    tier: str = "full"

    @property
    def name(self) -> str:
        parts = [self.norm + (str(self.groups) if self.norm == "group" else "") + ("_dim1" if self.dim == 1 else "")]
        parts += ["add"] if self.residual else []
        parts += [self.act] if self.act != "identity" else []
        kind = str(self.dtype).removeprefix("torch.")
        return f"{'+'.join(parts)}-{'x'.join(map(str, self.shape))}-{kind}-{self.layout}"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def floor_bytes(self, direction: str) -> int:
        """Bytes that must move: every input read once, every output written once (the parameters are noise)."""
        pre_norm, pre_act = self.residual == "pre_norm", self.residual == "pre_act"
        forward = 2 + (2 if pre_norm else 1 if self.residual else 0)
        backward = 3 + (1 if pre_norm else 2 if pre_act and self.act != "identity" else 0)
        return self.tensor_bytes * (forward if direction == "forward" else forward + backward)


def both(case: Case) -> list[Case]:
    return [replace(case, layout=layout) for layout in (CONTIGUOUS, CHANNELS_LAST)]


def _square(norm: str, batch: int, maps: list[tuple[int, int]], **options: object) -> list[Case]:
    return [c for channels, side in maps for c in both(Case(norm, (batch, channels, side, side), **options))]  # type: ignore[arg-type]


_RESNET = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
_EFFICIENTNET = [(32, 112), (96, 112), (96, 56), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7)]
_STABLE_DIFFUSION = [(320, 64), (640, 32), (1280, 16), (1280, 8), (960, 64), (1920, 32), (2560, 8)]
_SDXL_VAE = [(512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024)]
_NNUNET = [(32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4)]

MATRIX: list[Case] = [
    *(c for b in (32, 256) for c in _square("batch", b, _RESNET, act="relu", family="ResNet-50")),
    *(c for b in (32, 256) for c in _square("batch", b, _RESNET, act="relu", residual="pre_act", family="ResNet-50")),
    *_square("batch", 128, _EFFICIENTNET, act="silu", family="EfficientNet-B0"),
    Case("batch", (32, 64), family="small"),
    *both(Case("batch", (8, 64, 32, 32), act="relu", family="small")),
    *both(Case("batch", (4, 256, 28, 28), act="relu", family="small")),
    *both(Case("batch", (4, 128, 1024, 1024), act="relu", family="large")),
    Case("batch", (4096, 1024), act="relu", family="fully connected"),
    *(c for b in (1, 8) for c in _square("group", b, _STABLE_DIFFUSION, act="silu", groups=32, family="SD 1.5")),
    *_square("group", 4, [(320, 128), (640, 64), (1280, 32)], act="silu", groups=32, family="SDXL"),
    *_square("group", 1, _SDXL_VAE, act="silu", groups=32, family="SDXL VAE"),
    *(
        c
        for shape in ((1, 128, 20, 256, 256), (1, 512, 8, 45, 80), (1, 512, 16, 90, 160), (1, 512, 16, 180, 320))
        for c in both(Case("group", shape, act="silu", groups=32, family="video VAE"))
    ),
    *(
        c
        for shape in ((2, 64, 400, 672), (2, 256, 200, 336), (2, 256, 100, 168), (2, 256, 50, 84), (1024, 256, 7, 7))
        for c in both(Case("group", shape, act="relu", groups=32, family="Mask R-CNN"))
    ),
    *both(Case("group", (32, 256, 56, 56), groups=32, family="plain")),
    *(c for channels, side in _NNUNET for c in both(Case("instance", (2, channels, side, side, side), act="leaky_relu", family="nnU-Net"))),
    *_square("instance", 1, [(64, 256), (128, 128), (256, 64)], act="relu", family="CycleGAN"),
    *both(Case("instance", (16, 512, 64, 64), family="style")),
    *both(Case("instance", (4, 64, 512, 512), family="style")),
    *(Case("layer", rows, family="ConvNeXt-T") for rows in ((401408, 96), (100352, 192), (25088, 384), (6272, 768))),
    *_square("layer", 128, [(96, 56), (192, 28), (384, 14), (768, 7)], dim=1, family="ConvNeXt-T"),
    Case("layer", (25216, 768), act="gelu", family="ViT-B"),
    Case("layer", (1024, 12288), family="GPT-3"),
    *(
        Case("rms", rows, residual=r, family="LLM")
        for rows in ((16384, 4096), (8192, 8192), (4096, 16384), (8192, 5120), (2048, 4096), (131072, 128), (8192, 128), (1, 4096))
        for r in (None, "pre_norm")
    ),
    *(c for b in (32, 256) for c in _square("frn", b, _RESNET, act="tlu", family="ResNet-50")),
]

MATRIX[:] = [replace(c, tier="headline") if i % 7 == 0 else c for i, c in enumerate(MATRIX)]

_F32 = {"dtype": torch.float32}
_LARGE: list[Case] = [
    *both(Case("batch", (16, 64, 56, 56), act="relu", **_F32)),  # type: ignore[arg-type]
    *both(Case("batch", (16, 64, 56, 56), act="relu", residual="pre_act", **_F32)),  # type: ignore[arg-type]
    *both(Case("batch", (8, 96, 56, 56), act="silu", **_F32)),  # type: ignore[arg-type]
    *both(Case("group", (4, 320, 32, 32), act="silu", groups=32, **_F32)),  # type: ignore[arg-type]
    *both(Case("instance", (4, 64, 96, 96), act="leaky_relu", **_F32)),  # type: ignore[arg-type]
    *both(Case("instance", (2, 32, 32, 32, 32), act="leaky_relu", **_F32)),  # type: ignore[arg-type]
    Case("layer", (6272, 384), act="gelu", **_F32),  # type: ignore[arg-type]
    *both(Case("layer", (8, 96, 56, 56), act="gelu", dim=1, **_F32)),  # type: ignore[arg-type]
    Case("rms", (2048, 1024), **_F32),  # type: ignore[arg-type]
    *both(Case("frn", (16, 64, 56, 56), act="tlu", **_F32)),  # type: ignore[arg-type]
]
_SMALL: list[Case] = [
    *both(Case("batch", (2, 64, 8, 8), act="relu", **_F32)),  # type: ignore[arg-type]
    Case("group", (2, 64, 8, 8), act="silu", groups=8, **_F32),  # type: ignore[arg-type]
    Case("instance", (2, 64, 8, 8), act="leaky_relu", **_F32),  # type: ignore[arg-type]
    Case("layer", (128, 96), **_F32),  # type: ignore[arg-type]
]
QUICK: list[Case] = _LARGE + _SMALL


def parse(op: str, shape: str, dtype: str = "bf16", layout: str = CONTIGUOUS, groups: int = 32) -> Case:
    """Thin stand-in."""
    norm, _, act = op.partition("_")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    names = {"bn": "batch", "gn": "group", "in": "instance", "ln": "layer", "rms": "rms", "frn": "frn"}
    if norm not in names:
        raise ValueError(f"parse: op must begin with one of {', '.join(names)}, got {op}")
    try:
        sizes = tuple(map(int, shape.split("x")))
    except ValueError:
        raise ValueError(f"parse: shape must be sizes with x between them, got {shape}") from None
    return Case(names[norm], sizes, act=act or "identity", groups=groups if norm == "gn" else 1, dtype=kinds[dtype], layout=layout)


def select(words: Sequence[str]) -> list[Case]:
    """Thin stand-in."""
    return [c for c in MATRIX if "full" in words or c.tier in words]
