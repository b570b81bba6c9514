"""Small stand-ins for the blocks and layers of other packages, under their names and with their interfaces."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAND_INS: dict[str, type] = {}


def of(package: str) -> Any:
    """The class says that it is from ``package``."""

    def mark(cls: type) -> type:
        cls.__module__ = package
        STAND_INS[f"{package}.{cls.__qualname__}"] = cls
        return cls

    return mark


class Pickler(pickle.Pickler):
    """Stand-ins by name: their packages need not be there."""

    def persistent_id(self, obj: Any) -> str | None:
        return next((name for name, cls in STAND_INS.items() if cls is obj), None)


class Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> Any:
        return STAND_INS[name]


# ------------------------------------------------------------------------------------------------------------------ timm
class TimmBlock(nn.Module):
    """timm.models.resnet.BasicBlock."""

    def __init__(
        self, width: int, act: type = nn.ReLU, downsample: bool = False, drop: nn.Module | None = None, se: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.drop_block, self.act1, self.aa = drop or nn.Identity(), act(inplace=True), nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.se = se
        self.act2 = act(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) if downsample else None
        self.drop_path: nn.Module | None = None

    def zero_init_last(self) -> None:
        if getattr(self.bn2, "weight", None) is not None:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x = self.conv2(x)
        x = self.bn2(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)

        return x


@of("timm.layers.norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@of("timm.layers.norm_act")
class GroupNormAct(nn.GroupNorm):
    def __init__(self, channels: int, groups: int, act: nn.Module) -> None:
        super().__init__(groups, channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@of("timm.layers.activations")
class GELU(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


@of("timm.layers.norm")
class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@of("timm.layers.norm")
class RmsNorm2d(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.elementwise_affine = (channels,), eps, True
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt() * self.weight[:, None, None]


@of("timm.layers.filter_response_norm")
class FilterResponseNormTlu2d(nn.Module):
    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__()
        self.apply_act, self.rms, self.eps = apply_act, True, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels)) if apply_act else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * (x.square().mean((2, 3), keepdim=True) + self.eps).rsqrt()
        x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x if self.tau is None else torch.maximum(x, self.tau[:, None, None])


@of("timm.layers.evo_norm")
class EvoNorm2dS0(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.v = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.v[:, None, None] * x) * self.weight[:, None, None]


# ----------------------------------------------------------------------------------------------------------- torchvision
class VisionBlock(nn.Module):
    """torchvision.models.resnet.Bottleneck: one ReLU, three uses."""

    def __init__(self, width: int, downsample: bool = False, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), norm(width)) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), act)
        self.out_channels = channels


@of("torchvision.ops.misc")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self
        scale = b.weight * (b.running_var + b.eps).rsqrt()
        return x * scale[:, None, None] + (b.bias - b.running_mean * scale)[:, None, None]


class BasicConv2d(nn.Module):
    """torchvision.models.inception.BasicConv2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class DenseLayer(nn.Module):
    """torchvision.models.densenet._DenseLayer: a method in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
        return bottleneck_output

    def forward(self, input: Tensor) -> Tensor:
        prev_features = [input] if isinstance(input, Tensor) else input
        bottleneck_output = self.bn_function(prev_features)
        return self.conv2(self.relu2(self.norm2(bottleneck_output)))


# ------------------------------------------------------------------------------------------------------- medical imaging
class ADN(nn.Sequential):
    """MONAI's."""

    def __init__(self, ordering: str, channels: int, act: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        made = {"A": act, "D": nn.Dropout3d(dropout) if dropout else None, "N": nn.InstanceNorm3d(channels, affine=True)}
        for item in ordering:
            if made[item] is not None:
                self.add_module(item, made[item])


class ConvDropoutNormReLU(nn.Module):
    """dynamic_network_architectures' (nnU-Net): every layer under two names."""

    def __init__(self, channels: int, nonlin_first: bool = False, nonlin: bool = True) -> None:
        super().__init__()
        ops = []
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        ops.append(self.conv)
        self.norm = nn.InstanceNorm3d(channels, affine=True)
        ops.append(self.norm)
        if nonlin:
            self.nonlin = nn.LeakyReLU(0.01, inplace=True)
            ops.append(self.nonlin)
        if nonlin_first:
            ops[-1], ops[-2] = ops[-2], ops[-1]
        self.all_modules = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


@of("dynamic_network_architectures.building_blocks.residual")
class BasicBlockD(nn.Module):
    """Its last norm is a grandchild, the add and the activation are its own."""

    def __init__(self, channels: int, squeeze_excitation: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvDropoutNormReLU(channels)
        self.conv2 = ConvDropoutNormReLU(channels, nonlin=False)
        self.nonlin2 = nn.LeakyReLU(0.01, inplace=True)
        self.skip = ConvDropoutNormReLU(channels, nonlin=False)
        self.apply_stochastic_depth, self.apply_se = False, squeeze_excitation
        if squeeze_excitation:
            self.squeeze_excitation = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.skip(x)
        out = self.conv2(self.conv1(x))
        if self.apply_se:
            out = self.squeeze_excitation(out)
        out += residual
        y: Tensor = self.nonlin2(out)
        return y


@of("monai.networks.blocks.activation")
class Swish(nn.Module):
    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.alpha * x)


# ----------------------------------------------------------------------------------------------------------------- mmcv
@of("mmcv.cnn.bricks.conv_module")
class ConvModule(nn.Module):
    def __init__(self, channels: int, order: tuple[str, ...] = ("conv", "norm", "act")) -> None:
        super().__init__()
        self.order, self.with_norm, self.with_activation, self.with_explicit_padding = order, True, True, False
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm_name = "bn"
        self.add_module("bn", nn.BatchNorm2d(channels))
        self.activate = nn.LeakyReLU(0.3, inplace=True)
        self.efficient_conv_bn_eval_forward = None

    @property
    def norm(self) -> Any:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class ConvModuleUser(nn.Module):
    """Callers leave out the activation, or the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = ConvModule(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x), activate=False), norm=False)


# ------------------------------------------------------------------------------------------------------------- diffusers
class ResnetBlock2D(nn.Module):
    """diffusers': one SiLU for both norms and the time embedding, the second norm in a branch."""

    def __init__(self, channels: int, time_embedding_norm: str = "default") -> None:
        super().__init__()
        self.time_embedding_norm, self.skip_time_act, self.output_scale_factor = time_embedding_norm, False, 1.0
        self.norm1, self.conv1 = nn.GroupNorm(2, channels, eps=1e-6), nn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(5, channels if time_embedding_norm == "default" else 2 * channels)
        self.norm2, self.dropout = nn.GroupNorm(2, channels, eps=1e-6), nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.upsample = self.downsample = None
        self.conv_shortcut = nn.Conv2d(channels, channels, 1)

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = input_tensor

        hidden_states = self.norm1(hidden_states)
        hidden_states = self.nonlinearity(hidden_states)

        if self.upsample is not None:
            hidden_states = self.upsample(hidden_states)

        hidden_states = self.conv1(hidden_states)

        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]

        if self.time_embedding_norm == "default":
            if temb is not None:
                hidden_states = hidden_states + temb
            hidden_states = self.norm2(hidden_states)
        elif self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("temb")
            time_scale, time_shift = torch.chunk(temb, 2, dim=1)
            hidden_states = self.norm2(hidden_states)
            hidden_states = hidden_states * (1 + time_scale) + time_shift
        else:
            hidden_states = self.norm2(hidden_states)

        hidden_states = self.nonlinearity(hidden_states)

        hidden_states = self.dropout(hidden_states)
        hidden_states = self.conv2(hidden_states)

        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)

        return (input_tensor + hidden_states) / self.output_scale_factor


# ------------------------------------------------------------------------------------------------- what users write
class FunctionalBlock(nn.Module):
    """The ResNets of a hundred tutorials."""

    def __init__(self, width: int, project: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) if project else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class OneLiner(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.gn = nn.GroupNorm(2, width)

    def forward(self, x: Tensor, scale: float = 0.5, *, offset: float = 0.25) -> Tensor:
        y = F.leaky_relu(self.bn1(self.conv(x)), negative_slope=0.3)
        y = F.silu(self.bn2(y) + x * scale)
        return self.gn(y + offset).relu()
