"""All shapes that are timed, in one place, and the words that name them on the command line.

``MATRIX`` is meant for a GPU: first the headline cases in bfloat16, the most telling first, then all other shapes in bfloat16, then the
headline shapes in float16 and float32 (where cuDNN's batch norm can be reached). ``QUICK`` is what a laptop's CPU can time in float32:
every norm with 4 MB and more, and small tensors, where the host's time is what is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from ..activations import ACTIVATIONS

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
HEADLINE, FULL = "headline", "full"
NORMS = {
    "bn": "batch",
    "gn": "group",
    "in": "instance",
    "ln": "layer",
    "rms": "rms",
    "frn": "frn",
    "bin": "batch_instance",
    "brn": "batch_renorm",
    "sn": "switchable",
    "mbn": "mean_only",
    "evn": "eval",
    "itn": "whitening",
}  # words of the command line -> Case.norm
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
    **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("fp64", "float64", "double"), torch.float64),
}
_LAYOUTS = {
    **dict.fromkeys((CONTIGUOUS, "nchw"), CONTIGUOUS),
    **dict.fromkeys((CHANNELS_LAST, "nhwc"), CHANNELS_LAST),
}
_WIDE_PARAMETERS = frozenset(NORMS.values()) - {"group", "layer", "rms", "frn"}


@dataclass(frozen=True)
class Case:
    """One operation: ``norm`` with ``act`` and perhaps a residual on a tensor of ``shape`` in ``dtype`` and ``layout``.

    ``groups`` belongs to group norm. For layer and RMS norm ``dim`` is -1 (rows) or 1 (channels of maps). ``residual`` is None,
    ``"pre_act"`` (act(norm(x) + r)) or ``"pre_norm"`` (norm(x + r), which also returns x + r). ``tier`` is "headline" or "full".
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
    tier: str = FULL

    @property
    def name(self) -> str:
        parts = [self.norm + (str(self.groups) if self.norm == "group" else "") + ("_dim1" if self.dim == 1 else "")]
        parts = ["add", *parts] if self.residual == "pre_norm" else [*parts, "add"] if self.residual else parts
        parts += [self.act] if self.act != "identity" else []
        kind = str(self.dtype).removeprefix("torch.")
        return f"{'+'.join(parts)}-{'x'.join(map(str, self.shape))}-{kind}-{self.layout}"

    @property
    def rows(self) -> bool:
        """Whether the last dimension is normalized, and the others only counted."""
        return self.norm in ("layer", "rms") and self.dim == -1

    @property
    def channels(self) -> int:
        """Length of each parameter."""
        return self.shape[-1] if self.rows else self.shape[1]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """What the norm's parameters are kept in: float32 for half types, as autocast trains them, where torch has that; the input's
        type for group, layer, RMS and filter response norm, whose kernels in torch take, or are fast with, no other."""
        return torch.promote_types(self.dtype, torch.float32) if self.norm in _WIDE_PARAMETERS else self.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def both(case: Case) -> list[Case]:
    """The case in both memory formats."""
    return [replace(case, layout=layout) for layout in (CONTIGUOUS, CHANNELS_LAST)]


def _square(norm: str, batch: int, maps: list[tuple[int, int]], **options: object) -> list[Case]:
    return [c for channels, side in maps for c in both(Case(norm, (batch, channels, side, side), **options))]  # type: ignore[arg-type]


_RESNET = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
_EFFICIENTNET = [(32, 112), (96, 112), (96, 56), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7)]
_STABLE_DIFFUSION = [(320, 64), (640, 32), (1280, 16), (1280, 8), (960, 64), (1920, 32), (2560, 8)]
_SDXL_VAE = [(512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024)]
_VIDEO = [(1, 128, 20, 256, 256), (1, 512, 8, 45, 80), (1, 512, 16, 90, 160), (1, 512, 16, 180, 320)]
_MASK_RCNN = [(2, 64, 400, 672), (2, 256, 200, 336), (2, 256, 100, 168), (2, 256, 50, 84), (1024, 256, 7, 7)]
_NNUNET = [(32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4)]
_LLM = [(16384, 4096), (8192, 8192), (4096, 16384), (8192, 5120), (2048, 4096), (131072, 128), (8192, 128), (1, 4096)]

_SHAPES: list[Case] = [
    *(
        c
        for residual in (None, "pre_act")
        for batch in (32, 256)
        for c in _square("batch", batch, _RESNET, act="relu", residual=residual, family="ResNet-50")
    ),
    *_square("batch", 128, _EFFICIENTNET, act="silu", family="EfficientNet-B0"),
    *(
        c
        for residual in (None, "pre_act")
        for c in (
            Case("batch", (32, 64), act="relu", residual=residual, family="small"),
            *both(Case("batch", (8, 64, 32, 32), act="relu", residual=residual, family="small")),
            *both(Case("batch", (4, 256, 28, 28), act="relu", residual=residual, family="small")),
            *both(Case("batch", (4, 128, 1024, 1024), act="relu", residual=residual, family="large")),
            Case("batch", (4096, 1024), act="relu", residual=residual, family="fully connected"),
        )
    ),
    *(c for batch in (1, 8) for c in _square("group", batch, _STABLE_DIFFUSION, act="silu", groups=32, family="SD 1.5")),
    *_square("group", 4, [(320, 128), (640, 64), (1280, 32)], act="silu", groups=32, family="SDXL"),
    *_square("group", 1, _SDXL_VAE, act="silu", groups=32, family="SDXL VAE"),
    *(c for shape in _VIDEO for c in both(Case("group", shape, act="silu", groups=32, family="video VAE"))),
    *(c for act in ("identity", "relu") for shape in _MASK_RCNN for c in both(Case("group", shape, act, groups=32, family="Mask R-CNN"))),
    *(c for act in ("identity", "relu") for c in both(Case("group", (32, 256, 56, 56), act, groups=32, family="plain"))),
    *(c for channels, side in _NNUNET for c in both(Case("instance", (2, channels, side, side, side), act="leaky_relu", family="nnU-Net"))),
    *_square("instance", 1, [(64, 256), (128, 128), (256, 64)], act="relu", family="CycleGAN"),
    *both(Case("instance", (16, 512, 64, 64), family="style")),
    *both(Case("instance", (4, 64, 512, 512), family="style")),
    *(Case("layer", rows, family="ConvNeXt-T") for rows in ((401408, 96), (100352, 192), (25088, 384), (6272, 768))),
    *_square("layer", 128, [(96, 56), (192, 28), (384, 14), (768, 7)], dim=1, family="ConvNeXt-T"),
    *(Case("layer", (25216, 768), act, family="ViT-B") for act in ("identity", "gelu")),
    Case("layer", (1024, 12288), family="GPT-3"),
    *(Case("rms", rows, residual=residual, family="LLM") for residual in (None, "pre_norm") for rows in _LLM),
    *(c for batch in (32, 256) for c in _square("frn", batch, _RESNET, act="tlu", family="ResNet-50")),
    *(
        c
        for shape in ((32, 256, 56, 56), (256, 64, 56, 56), (2, 256, 200, 336))
        for norm in ("batch_instance", "batch_renorm", "switchable", "mean_only", "eval", "whitening")
        for c in both(Case(norm, shape, family="exotic"))
    ),
]

# What the goals of docs/performance.md name, the most telling first: (operation, shape, memory formats)
_BOTH, _NCHW, _NHWC = ("nchw", "nhwc"), ("nchw",), ("nhwc",)
_TELLING: list[tuple[str, str, tuple[str, ...]]] = [
    ("bn_add_relu", "32x256x56x56", _BOTH),
    ("gn_silu", "8x320x64x64", _BOTH),
    ("add_rms", "16384x4096", _NCHW),
    ("in_leaky_relu", "2x64x64x64x64", _BOTH),
    ("bn_relu", "256x256x56x56", _BOTH),
    ("gn_silu", "1x128x20x256x256", _NCHW),
    ("ln", "401408x96", _NCHW),
    ("bn_silu", "128x96x112x112", _BOTH),
    ("gn_silu", "1x320x64x64", _BOTH),
    ("frn_tlu", "32x256x56x56", _BOTH),
    ("rms", "16384x4096", _NCHW),
    ("bn_relu", "8x64x32x32", _BOTH),
    ("ln2d", "128x96x56x56", _BOTH),
    ("bn_relu", "4x128x1024x1024", _NCHW),
    ("bn_add_relu", "256x256x56x56", _BOTH),
    ("ln", "1024x12288", _NCHW),
    ("gn_silu", "1x512x16x180x320", _NCHW),
    ("in_leaky_relu", "2x32x128x128x128", _BOTH),
    ("bn_relu", "32x256x56x56", _NHWC),
    ("bn_relu", "256x64x56x56", _NHWC),
    ("gn_silu", "1x512x512x512", _BOTH),
    ("gn_silu", "4x320x128x128", _NHWC),
    ("gn_relu", "2x256x200x336", _BOTH),
    ("bin", "32x256x56x56", _BOTH),
    ("bn_relu", "256x2048x7x7", _NHWC),
    ("rms", "8192x8192", _NCHW),
    ("ln_gelu", "25216x768", _NCHW),
    ("add_rms", "2048x4096", _NCHW),
    ("in", "4x64x512x512", _NCHW),
    ("in_relu", "1x64x256x256", _BOTH),
    ("bn_relu", "256x64x112x112", _NHWC),
    ("gn_silu", "1x256x1024x1024", _NHWC),
    ("gn_relu", "1024x256x7x7", _NCHW),
    ("gn_silu", "1x1280x8x8", _NCHW),
    ("rms", "131072x128", _NCHW),
    ("bn_relu", "32x64", _NCHW),
    ("bn_relu", "4096x1024", _NCHW),
    ("rms", "1x4096", _NCHW),
    ("brn", "32x256x56x56", _NCHW),
    ("sn", "32x256x56x56", _NCHW),
    ("evn", "32x256x56x56", _NCHW),
    ("mbn", "32x256x56x56", _NCHW),
    ("itn", "32x256x56x56", _NCHW),
]


def parse(op: str, shape: str, dtype: str | torch.dtype = "bf16", layout: str = CONTIGUOUS, groups: int = 32) -> Case:
    """A case from the words of the command line.

    Args:
        op: ``[add_]NORM[2d][_add][_ACT]``, e.g. ``bn_add_relu``, ``gn_silu``, ``in_leaky_relu``, ``add_rms``, ``ln2d_gelu``. NORM is a key
            of `NORMS`; ``2d`` normalizes the channels of maps (ln and rms only); ``add_`` in front adds a residual before the norm,
            ``_add`` behind it before the activation. ACT is a name of ``normfused.ACTIVATIONS``.
        shape: sizes joined by ``x``: ``32x256x56x56``; rows are ``16384x4096``.
        dtype: bf16 (default), fp16, fp32, fp64, torch's names of them, or a ``torch.dtype``.
        layout: contiguous (default, nchw) or channels_last (nhwc).
        groups: of gn; 32 by default.

    Raises:
        ValueError: one of the words is not known, or the shape does not fit the norm.
    """
    words = op.split("_")
    before = len(words) > 1 and words[0] == "add"
    word, rest = (words[1], words[2:]) if before else (words[0], words[1:])
    over_channels = word.endswith("2d")
    norm = NORMS.get(word.removesuffix("2d"))
    if norm is None or (over_channels and norm not in ("layer", "rms")):
        raise ValueError(f"parse: op must name one of the norms {', '.join(NORMS)}, ln2d, rms2d, got {op!r}")
    behind = rest[:1] == ["add"]
    act = "_".join(rest[1:] if behind else rest) or "identity"
    if act not in ACTIVATIONS:
        raise ValueError(f"parse: op must end with one of the activations {', '.join(ACTIVATIONS)}, got {act!r} in {op!r}")
    if before and (behind or norm not in ("layer", "rms")):
        raise ValueError(f"parse: add_ in front must be followed by ln or rms without another add, got {op!r}")
    sizes = tuple(int(size) for size in shape.split("x") if size.isdecimal())
    if len(sizes) != shape.count("x") + 1 or 0 in sizes:
        raise ValueError(f"parse: shape must be positive sizes joined by x, e.g. 32x256x56x56, got {shape!r}")
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
        raise ValueError(f"parse: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if layout not in _LAYOUTS:
        raise ValueError(f"parse: layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    case = Case(
        norm,
        sizes,
        act,
        "pre_norm" if before else "pre_act" if behind else None,
        groups if norm == "group" else 1,
        1 if over_channels else -1,
        kind,
        _LAYOUTS[layout],
    )
    _check(case, op)
    return case


def _check(case: Case, op: str) -> None:
    least, most = (2, 5) if case.norm in ("batch", "layer", "rms") else (3, 5)
    if not least <= len(case.shape) <= most:
        raise ValueError(f"parse: shape of {op} must have {least} to {most} dimensions, got {len(case.shape)}")
    if case.layout == CHANNELS_LAST and (case.rows or len(case.shape) < 3):
        raise ValueError(f"parse: layout of {op} must be contiguous for rows, got {case.layout} with {len(case.shape)} dimensions")
    if case.norm == "group" and (case.groups < 1 or case.channels % case.groups):
        raise ValueError(f"parse: groups must divide the channels {case.channels}, got {case.groups}")


def select(words: Sequence[str], cases: Iterable[Case] | None = None) -> list[Case]:
    """The cases (`MATRIX` by default) whose name, family or tier contains any of ``words``, in their order; all for no words.

    Raises:
        ValueError: a word that no case contains.
    """
    cases = list(MATRIX if cases is None else cases)

    def text(case: Case) -> str:
        return f"{case.name} {case.family} {case.tier}"

    for word in words:
        if not any(word in text(case) for case in cases):
            families = ", ".join(dict.fromkeys(case.family for case in cases if case.family))
            raise ValueError(f"select: words must occur in a case's name, family ({families}) or tier, got {word!r}")
    return [case for case in cases if not words or any(word in text(case) for word in words)]


def _matrix() -> list[Case]:
    known = {case.name: case for case in _SHAPES}
    names = [parse(op, shape, layout=layout).name for op, shape, layouts in _TELLING for layout in layouts]
    headline = [replace(known.pop(name), tier=HEADLINE) for name in names]
    return [*headline, *known.values(), *(replace(c, dtype=kind, tier=FULL) for kind in (torch.float16, torch.float32) for c in headline)]


MATRIX: list[Case] = _matrix()


def _quick(op: str, shape: str, layout: str = CONTIGUOUS, groups: int = 32) -> Case:
    return replace(parse(op, shape, torch.float32, layout, groups), family="quick", tier=HEADLINE)


_LARGE = [
    *(_quick("bn_relu", "8x64x56x56", layout) for layout in (CONTIGUOUS, CHANNELS_LAST)),
    _quick("bn_add_relu", "8x64x56x56", CHANNELS_LAST),
    _quick("bn_silu", "8x96x56x56"),
    *(_quick("gn_silu", "4x320x32x32", layout) for layout in (CONTIGUOUS, CHANNELS_LAST)),
    _quick("in_leaky_relu", "2x32x32x32x32"),
    _quick("in_leaky_relu", "8x64x48x48", CHANNELS_LAST),
    _quick("ln_gelu", "3136x384"),
    _quick("ln2d_gelu", "4x96x56x56", CHANNELS_LAST),
    _quick("add_rms", "1024x1024"),
    _quick("frn_tlu", "8x64x56x56"),
    _quick("bin", "8x64x48x48", CHANNELS_LAST),
    _quick("brn", "8x64x56x56"),
    _quick("sn", "8x64x48x48"),
    _quick("evn", "8x64x48x48", CHANNELS_LAST),
    _quick("mbn", "8x64x48x48"),
    _quick("itn", "8x64x48x48"),
]
_SMALL = [
    _quick("bn_relu", "2x64x8x8"),
    _quick("gn_silu", "2x64x8x8", groups=8),
    _quick("in_leaky_relu", "2x64x8x8"),
    _quick("ln", "128x96"),
]
QUICK: list[Case] = _LARGE + _SMALL
