"""Every known block, as a stand-in: the same network after conversion, and as much of it fused as can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from normfused import fuse_norms
from tests.convert import blocks
from tests.convert.check import moved, same_after_conversion

MAP = (3, 4, 5, 6)
VOLUME = (2, 4, 3, 4, 5)
LEAKY = "leaky_relu(negative_slope=0.01)"


def _data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# name: (network, shapes of the inputs, expected "kind activation [+]" of each norm in order; + is the residual, - is nothing)
CASES: dict[str, tuple[Any, tuple[tuple[int, ...], ...], str]] = {
    "sequential": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.BatchNorm2d(4)), (MAP,), "relu -"),
    "sequential_prelu": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.PReLU(4)), (MAP,), "prelu"),
    "sequential_1d": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU("tanh"), nn.RMSNorm(8), nn.SiLU()),
        ((4, 6),),
        "gelu_tanh silu",
    ),
    "timm": (lambda: blocks.TimmBlock(4), (MAP,), "relu relu+"),
    "timm_silu_downsample": (lambda: blocks.TimmBlock(4, nn.SiLU, True), (MAP,), "silu silu+ -"),
    "timm_se": (lambda: blocks.TimmBlock(4, se=nn.Conv2d(4, 4, 1)), (MAP,), "relu -"),
    "timm_norm_act": (
        lambda: nn.Sequential(
            blocks.BatchNormAct2d(4, nn.Hardswish()), blocks.BatchNormAct2d(4, nn.Identity()), blocks.GroupNormAct(4, 2, nn.LeakyReLU(0.2))
        ),
        (MAP,),
        "hardswish - leaky_relu(negative_slope=0.2)",
    ),
    "timm_own_gelu": (
        lambda: nn.Sequential(blocks.BatchNormAct2d(4, blocks.GELU()), nn.BatchNorm2d(4), blocks.GELU()),
        (MAP,),
        "gelu gelu",
    ),
    "timm_layer_norms": (lambda: nn.Sequential(blocks.LayerNorm2d(4, eps=1e-6), nn.GELU(), blocks.RmsNorm2d(4)), (MAP,), "gelu -"),
    "timm_frn": (
        lambda: nn.Sequential(blocks.FilterResponseNormTlu2d(4), nn.ReLU(), blocks.FilterResponseNormTlu2d(4, False)),
        (MAP,),
        "tlu -",
    ),
    "torchvision": (lambda: nn.Sequential(blocks.VisionBlock(4), blocks.VisionBlock(4, True)), (MAP,), "relu relu relu+ relu relu relu+ -"),
    "torchvision_frozen": (lambda: blocks.VisionBlock(4, norm=blocks.FrozenBatchNorm2d), (MAP,), "relu relu relu+"),
    "torchvision_conv_norm": (lambda: blocks.Conv2dNormActivation(4, nn.ReLU6(inplace=True)), (MAP,), "relu6"),
    "torchvision_inception": (lambda: blocks.BasicConv2d(4), (MAP,), "relu"),
    "torchvision_densenet": (lambda: blocks.DenseLayer(4), (MAP,), "relu relu"),
    "monai": (lambda: nn.Sequential(nn.Conv3d(4, 4, 1), blocks.ADN("NDA", 4, nn.PReLU())), (VOLUME,), "prelu"),
    "monai_dropout": (lambda: nn.Sequential(nn.Conv3d(4, 4, 1), blocks.ADN("NDA", 4, nn.PReLU(), 0.5)), (VOLUME,), "prelu"),
    "monai_dropout_before_silu": (lambda: nn.Sequential(nn.Conv3d(4, 4, 1), blocks.ADN("NDA", 4, nn.SiLU(), 0.5)), (VOLUME,), "-"),
    "monai_other_order": (lambda: nn.Sequential(nn.Conv3d(4, 4, 1), blocks.ADN("ADN", 4, nn.PReLU())), (VOLUME,), "-"),
    "nnunet": (lambda: blocks.ConvDropoutNormReLU(4), (VOLUME,), "leaky_relu(negative_slope=0.01)"),
    "nnunet_nonlin_first": (lambda: blocks.ConvDropoutNormReLU(4, True), (VOLUME,), "-"),
    "nnunet_residual": (
        lambda: nn.Sequential(blocks.BasicBlockD(4), blocks.BasicBlockD(4, True)),
        (VOLUME,),
        " ".join(f"{LEAKY} {last} -" for last in (LEAKY + "+", "-")),
    ),
    "monai_own_acts": (
        lambda: nn.Sequential(blocks.ADN("NA", 4, blocks.Swish()), blocks.ADN("NA", 4, blocks.Swish(2.0))),
        (VOLUME,),
        "silu -",
    ),
    "mmcv": (lambda: blocks.ConvModuleUser(4), (MAP,), "leaky_relu(negative_slope=0.3)"),
    "mmcv_other_order": (lambda: blocks.ConvModule(4, ("act", "conv", "norm")), (MAP,), "-"),
    "diffusers": (lambda: blocks.ResnetBlock2D(4), (MAP, (3, 5)), "silu silu"),
    "diffusers_scale_shift": (lambda: blocks.ResnetBlock2D(4, "scale_shift"), (MAP, (3, 5)), "silu -"),
    "functional": (lambda: nn.Sequential(blocks.FunctionalBlock(4), blocks.FunctionalBlock(4, False)), (MAP,), "relu relu+ - relu relu+"),
    "one_liner": (lambda: blocks.OneLiner(4), (MAP,), "leaky_relu(negative_slope=0.3) silu+ relu"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_network(name: str) -> None:
    make, shapes, expected = CASES[name]
    report = same_after_conversion(moved(make()), *(_data(*shape) for shape in shapes))
    assert " ".join((r.act or "-") + "+" * r.residual for r in report.rows) == expected, report
    assert report.skipped == [] and not any(r.note for r in report.rows if r.act), report


def test_what_is_not_known_stays() -> None:
    """EvoNorm has no fused form; a DropBlock stands between; a user's subclass has code of its own."""

    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(blocks.EvoNorm2dS0(4), blocks.BatchNormAct2d(4, nn.ReLU(), nn.Dropout(0.5)), Mine(4), nn.ReLU())
    report = fuse_norms(model)
    assert [r.now for r in report.rows] == ["", "", ""] and all(r.note for r in report.rows)
    assert type(model[2]) is Mine and "Dropout stands between" in report.rows[1].note
