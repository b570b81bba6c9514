"""Networks of other packages, where they are installed: the same network after conversion, with the norms that were counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfused as nf
from tests.convert.check import moved, same_after_conversion
from tests.support.packages import package


def test_timm_frn() -> None:
    """timm takes the mean square in float32 whatever the type: as near to the network in float64 as timm's own."""
    timm = package("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_50d_frn", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x).detach()
    report = nf.fuse_norms(model)
    assert len(report.fused) == len(report.rows) == 51 and all(r.act == "tlu" for r in report.rows)
    got = model(x).detach()
    exact = model.double()(x.double()).detach()
    assert float((got - exact).abs().max()) <= 2 * float((wanted - exact).abs().max())


def image(size: int = 64, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


# name: (norms, with an activation, with the residual of these)
TIMM = {
    "resnet18": (20, 17, 8),
    "resnet26d": (31, 27, 8),
    "seresnet18": (20, 9, 0),
    "mobilenetv3_small_050": (34, 23, 0),
    "efficientnet_b0": (49, 33, 0),
    "regnety_002": (44, 27, 0),
    "densenet121": (121, 121, 0),
    "convnext_atto": (17, 0, 0),
    "vit_tiny_patch16_224": (25, 0, 0),
    "cspresnet50": (55, 38, 0),
}
QUICK = ("resnet18", "mobilenetv3_small_050")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TIMM])
def test_timm(name: str) -> None:
    timm = package("timm")
    torch.manual_seed(0)
    model = moved(timm.create_model(name, num_classes=10))
    report = same_after_conversion(model, image(224 if name.startswith("vit") else 64), compiled=name in QUICK, exported=name in QUICK)
    counted = (len(report.converted), len(report.fused), sum(r.residual for r in report.rows))
    assert counted == TIMM[name], report
    assert report.skipped == []


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("resnet18", (20, 17, 8)),
        ("mobilenet_v3_small", (34, 23, 0)),
        ("densenet121", (121, 120, 0)),
        ("vgg11_bn", (8, 8, 0)),
        ("googlenet", (57, 57, 0)),
    ],
)
def test_torchvision(name: str, counted: tuple[int, ...]) -> None:
    package("torchvision")
    models = package("torchvision.models")
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = moved(getattr(models, name)(weights=None, num_classes=10, **options))
    model = model.features if name.startswith("vgg") else model
    report = same_after_conversion(model, image(), compiled=name == "resnet18", exported=False)
    assert (len(report.converted), len(report.fused), sum(r.residual for r in report.rows)) == counted, report


def test_diffusers() -> None:
    diffusers = package("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    whole = Sample(moved(model))
    report = same_after_conversion(whole, image(16), torch.tensor([3, 7]), compiled=False, exported=False)
    blocks = [r for r in report.rows if "resnets" in r.name]
    assert len(blocks) == 16 and all(r.act == "silu" for r in blocks), report
    assert next(r for r in report.rows if r.name.endswith("conv_norm_out")).act == "silu", report


class Sample(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.unet(x, time).sample
        return y


def test_monai() -> None:
    nets = package("monai.networks.nets")
    torch.manual_seed(0)
    model = moved(nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2))
    report = same_after_conversion(model, torch.randn(1, 1, 16, 16, 16, dtype=torch.float64), compiled=False, exported=False)
    assert report.rows and all(r.act == "prelu" for r in report.rows), report


def test_nnunet() -> None:
    unet = package("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(0)
    model = unet.PlainConvUNet(
        1, 3, (4, 8, 8), nn.Conv3d, 3, (1, 2, 2), 2, 2, 2, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    report = same_after_conversion(moved(model), torch.randn(1, 1, 16, 16, 16, dtype=torch.float64), compiled=False, exported=False)
    assert len(report.rows) == 10 and all(r.act.startswith("leaky_relu") for r in report.rows), report


def test_segmentation_models() -> None:
    smp = package("segmentation_models_pytorch")
    torch.manual_seed(0)
    report = same_after_conversion(moved(smp.Unet("resnet18", encoder_weights=None, classes=2)), image(), compiled=False, exported=False)
    assert (len(report.rows), len(report.fused), sum(r.residual for r in report.rows)) == (30, 27, 8), report


def test_converters_of_timm_are_stopped() -> None:
    layers = package("timm.layers")
    timm = package("timm")
    for convert in (layers.convert_sync_batchnorm, layers.freeze_batch_norm_2d):
        model = timm.create_model("resnet18")
        nf.fuse_norms(model)
        with pytest.raises(RuntimeError, match="would silently drop its fused activation relu; use normfused"):
            convert(model)
