"""Which networks are timed, full size and small enough for one CPU core, and why one of them cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import CHANNELS_LAST, CONTIGUOUS
from .convert import fuse
from .layers import NORMFUSED, filter_response_norm, group_norm, instance_norm
from .models import CycleGanGenerator, DiffusionUNet, NnUNet, ResNet

CHANNELS_LAST_3D = "channels_last_3d"
MEMORY_FORMATS = {
    CONTIGUOUS: torch.contiguous_format,
    CHANNELS_LAST: torch.channels_last,
    CHANNELS_LAST_3D: torch.channels_last_3d,
}


@dataclass(frozen=True)
class Size:
    """``build(norms)`` makes the network; ``shape`` is one sample's input (C, \\*); ``batches`` are those that are timed."""

    build: Callable[[str], nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """``data(batch, shape)`` gives (inputs, target), random on the CPU; ``loss(output, target)`` a scalar."""

    data: Callable[[int, tuple[int, ...]], tuple[tuple[Tensor, ...], Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A network that is built with ``torch.nn`` or ``normfused`` norms, and what it learns from random data.

    ``layouts`` are those that are timed unless one is asked for. ``dtype`` is what autocast computes in on a GPU; on a CPU it is
    float32. ``package`` must be installed.
    """

    name: str
    description: str
    norm: str
    full: Size
    small: Size
    task: Task
    layouts: tuple[str, ...] = (CONTIGUOUS,)
    dtype: torch.dtype = torch.bfloat16
    package: str | None = None
    note: str | None = None  # of the comparison under autocast


# ------------------------------------------------------------------------------------------------------------- tasks
def _classes(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.randn(batch, *shape),), torch.randint(10, (batch,))


def _tissues(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.randn(batch, *shape),), torch.randint(3, (batch, *shape[1:]))


def _noise(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.randn(batch, *shape), torch.randint(1000, (batch,)).float()), torch.randn(batch, *shape)


def _translation(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.randn(batch, *shape).tanh(),), torch.randn(batch, *shape).tanh()


_CLASSIFY, _SEGMENT = Task(_classes, F.cross_entropy), Task(_tissues, F.cross_entropy)
_DENOISE, _TRANSLATE = Task(_noise, F.mse_loss), Task(_translation, F.l1_loss)


# ------------------------------------------------------------------------------------------------------------- networks
def _timm(name: str, **options: Any) -> Callable[[str], nn.Module]:
    def build(norms: str) -> nn.Module:
        import timm  # type: ignore[import-not-found,unused-ignore]

        model: nn.Module = timm.create_model(name, **options)
        return fuse(model) if norms == NORMFUSED else model

    return build


_FLOAT32 = "under autocast torch's {} is float32; normfused's has the input's type"

_ALL = (
    Network(
        name="resnet50",
        description="timm resnet50, ImageNet: BatchNorm + ReLU, with the shortcut in every third (He et al., arXiv 1512.03385)",
        norm="batch",
        # a last norm with weight 0, as timm starts it, would hide what that norm computes from the loss
        full=Size(_timm("resnet50", zero_init_last=False), (3, 224, 224), (32, 256)),
        small=Size(_timm("resnet50", zero_init_last=False, channels=(16, 32, 64, 128), num_classes=10), (3, 64, 64), (8,)),
        task=_CLASSIFY,
        layouts=(CHANNELS_LAST,),
        package="timm",
    ),
    Network(
        name="efficientnet_b0",
        description="timm efficientnet_b0, ImageNet: BatchNorm + SiLU (Tan & Le, arXiv 1905.11946)",
        norm="batch",
        full=Size(_timm("efficientnet_b0"), (3, 224, 224), (128,)),
        small=Size(_timm("efficientnet_b0", num_classes=10), (3, 64, 64), (4,)),
        task=_CLASSIFY,
        layouts=(CHANNELS_LAST,),
        package="timm",
    ),
    Network(
        name="convnext_tiny",
        description="timm convnext_tiny, ImageNet: LayerNorm of rows and of channels (Liu et al., arXiv 2201.03545)",
        norm="layer",
        full=Size(_timm("convnext_tiny"), (3, 224, 224), (128,)),
        small=Size(_timm("convnext_tiny", depths=(1, 1, 2, 1), dims=(32, 64, 96, 128), num_classes=10), (3, 64, 64), (4,)),
        task=_CLASSIFY,
        layouts=(CHANNELS_LAST,),
        package="timm",
        note=_FLOAT32.format("layer norm"),
    ),
    Network(
        name="diffusion_unet",
        description="residual blocks of Stable Diffusion's U-Net, 64 x 64 latents: GroupNorm(32) + SiLU (Rombach et al., arXiv 2112.10752)",
        norm="group",
        full=Size(lambda norms: DiffusionUNet(group_norm(norms)), (4, 64, 64), (1, 8)),
        small=Size(lambda norms: DiffusionUNet(group_norm(norms, 8), width=32, factors=(1, 2), blocks=1), (4, 16, 16), (2,)),
        task=_DENOISE,
        note=_FLOAT32.format("group norm"),
    ),
    Network(
        name="nnunet",
        description="nnU-Net's 3d_fullres, 128^3 patches: InstanceNorm3d + LeakyReLU (Isensee et al., Nature Methods 2021)",
        norm="instance",
        full=Size(lambda norms: NnUNet(instance_norm(norms, 3, affine=True)), (1, 128, 128, 128), (2,)),
        small=Size(lambda norms: NnUNet(instance_norm(norms, 3, affine=True), widths=(8, 16, 32)), (1, 16, 16, 16), (2,)),
        task=_SEGMENT,
        layouts=(CONTIGUOUS, CHANNELS_LAST_3D),
    ),
    Network(
        name="cyclegan",
        description="CycleGAN's generator, 256 x 256 images: InstanceNorm2d + ReLU, residual blocks (Zhu et al., arXiv 1703.10593)",
        norm="instance",
        full=Size(lambda norms: CycleGanGenerator(instance_norm(norms, 2, affine=False)), (3, 256, 256), (1,)),
        small=Size(lambda norms: CycleGanGenerator(instance_norm(norms, 2, affine=False), width=8, blocks=2), (3, 32, 32), (1,)),
        task=_TRANSLATE,
    ),
    Network(
        name="resnet50_frn",
        description="ResNet-50 with FRN + TLU in place of BatchNorm + ReLU (Singh & Krishnan, arXiv 1911.09737)",
        norm="frn",
        full=Size(lambda norms: ResNet(filter_response_norm(norms), "tlu"), (3, 224, 224), (32,)),
        small=Size(lambda norms: ResNet(filter_response_norm(norms), "tlu", (1, 1, 1, 1), 16, 10), (3, 64, 64), (4,)),
        task=_CLASSIFY,
        layouts=(CHANNELS_LAST,),
        note=_FLOAT32.format("chain of FRN and TLU"),
    ),
)
NETWORKS: dict[str, Network] = {network.name: network for network in _ALL}


def absent(device: str) -> dict[str, str]:
    """Name -> why that network cannot be run on ``device`` (``"cuda"`` or ``"cpu"``); only those that cannot."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(NETWORKS, "torch sees no GPU")
    reasons = {name: _missing(network.package) for name, network in NETWORKS.items() if network.package}
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def _missing(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # an import that fails for whatever reason is a package that is absent
        return f"{package}: {type(error).__name__}: {error}"
    return None
