"""Stand-ins for other packages: the part of their public interface that the integrations use, so that these run where they are missing.

Each says after which version it was written. The tests run with the packages themselves too, where they are installed.
"""

from __future__ import annotations

import abc
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """A module of that name and its parents, importable until the test ends."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if getattr(sys.modules.get(path), "__file__", "stand-in") != "stand-in" or path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []  # type: ignore[attr-defined]
            made.__file__ = "stand-in"
            monkeypatch.setitem(sys.modules, path, made)
            if i > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], made, raising=False)
    found = sys.modules[name]
    for key, value in members.items():
        setattr(found, key, value)
    return found


# ------------------------------------------------------------------------------------------------------------- timm 1.0
class SeparateNet(nn.Module):
    """As ResNet: a norm from ``get_norm_layer`` and an activation of its own."""

    def __init__(self, norm_layer: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3), norm_layer(8, device=None, dtype=None), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))


class InOneNet(nn.Module):
    """As EfficientNet: norm and activation from ``get_norm_act_layer``, a last one without."""

    def __init__(self, norm_act_layer: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), norm_act_layer(8, inplace=True, device=None, dtype=None)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), norm_act_layer(8, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


class BatchNormAct(nn.BatchNorm2d):
    """timm.layers.BatchNormAct2d."""

    def __init__(self, channels: int, act_layer: Any = nn.ReLU, apply_act: bool = True, inplace: bool = True, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), act_layer() if apply_act and act_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


BatchNormAct.__module__, BatchNormAct.__qualname__, BatchNormAct.__name__ = "timm.layers.norm_act", "BatchNormAct2d", "BatchNormAct2d"


def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    norm_map: dict[str, Any] = {"batchnorm2d": nn.BatchNorm2d}
    norm_act_map: dict[str, Any] = {"batchnorm2d": BatchNormAct}
    with_act_layer: set[Any] = {BatchNormAct}
    notrace: set[type] = set()
    acts = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}

    def get_norm_layer(norm_layer: Any) -> Any:
        return norm_map[norm_layer.replace("_", "").lower()] if isinstance(norm_layer, str) else norm_layer

    def get_norm_act_layer(norm_layer: Any, act_layer: Any = None) -> Any:
        if isinstance(norm_layer, str):
            found = norm_act_map[norm_layer.replace("_", "").lower()]
        elif isinstance(norm_layer, types.FunctionType):
            found = norm_layer
        else:
            found = norm_act_map[norm_layer.__name__.lower()]
        return functools.partial(found, act_layer=act_layer) if found in with_act_layer else found

    def create_norm_act_layer(layer_name: Any, num_features: int, act_layer: Any = None, apply_act: bool = True, **options: Any) -> Any:
        return get_norm_act_layer(layer_name, act_layer)(num_features, apply_act=apply_act, **options)

    def create_act_layer(name: Any, inplace: bool | None = None, **options: Any) -> nn.Module:
        made: nn.Module = (acts[name] if isinstance(name, str) else name)(**options)
        return made

    entrypoints: dict[str, Callable[..., nn.Module]] = {
        "separate": lambda norm_layer=nn.BatchNorm2d: SeparateNet(get_norm_layer(norm_layer)),
        "in_one": lambda norm_layer=nn.BatchNorm2d: InOneNet(get_norm_act_layer(norm_layer, nn.SiLU)),
    }
    layers = {"get_norm_layer": get_norm_layer, "get_norm_act_layer": get_norm_act_layer, "create_norm_act_layer": create_norm_act_layer}
    module(monkeypatch, "timm.layers", **layers, create_act_layer=create_act_layer, register_notrace_module=notrace.add)
    module(monkeypatch, "timm.layers.create_norm", _NORM_MAP=norm_map)
    module(monkeypatch, "timm.layers.create_norm_act", _NORM_ACT_MAP=norm_act_map, _NORM_ACT_REQUIRES_ARG=with_act_layer)
    factory = module(monkeypatch, "timm.models._factory", model_entrypoint=entrypoints.__getitem__)

    def create_model(name: str, **options: Any) -> nn.Module:
        made: nn.Module = factory.model_entrypoint(name)(**options)
        return made

    return module(monkeypatch, "timm", __version__="1.0 (stand-in)", create_model=create_model)


# -------------------------------------------------------------------------------------------- mmengine 0.10, mmcv 2.2
class Registry:
    """mmengine.registry.Registry."""

    def __init__(self) -> None:
        self.module_dict: dict[str, type] = {}

    def register_module(self, name: str | None = None, force: bool = False, module: Any = None) -> None:
        assert name is not None
        if not force and name in self.module_dict:
            raise KeyError(f"{name} is already registered")
        self.module_dict[name] = module

    def get(self, key: str) -> Any:
        return self.module_dict.get(key)


def infer_abbr(cls: type) -> str:
    """mmcv.cnn.bricks.norm.infer_abbr: how a norm is called in its block."""
    assert inspect.isclass(cls)
    if hasattr(cls, "_abbr_"):
        return str(cls._abbr_)
    bases = {
        nn.modules.instancenorm._InstanceNorm: "in", nn.modules.batchnorm._BatchNorm: "bn", nn.GroupNorm: "gn", nn.LayerNorm: "ln"
    }  # fmt: skip
    words = {"batch": "bn", "group": "gn", "layer": "ln", "instance": "in"}
    by_base = next((short for base, short in bases.items() if issubclass(cls, base)), None)
    return by_base or next((short for word, short in words.items() if word in cls.__name__.lower()), "norm_layer")


def mmcv(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A namespace with MODELS, build_norm_layer, infer_abbr and fuse_conv_bn."""
    registry = Registry()

    def build_norm_layer(cfg: dict[str, Any], num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
        options = dict(cfg)
        kind = options.pop("type")
        cls = registry.get(kind)
        requires_grad = options.pop("requires_grad", True)
        options.setdefault("eps", 1e-5)
        layer: Any = cls(num_channels=num_features, **options) if cls is nn.GroupNorm else cls(num_features, **options)
        if kind == "SyncBN" and hasattr(layer, "_specify_ddp_gpu_num"):
            layer._specify_ddp_gpu_num(1)
        for p in layer.parameters():
            p.requires_grad = requires_grad
        return infer_abbr(cls) + str(postfix), layer

    def _fuse_conv_bn(conv: Any, bn: Any) -> nn.Module:
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        conv.weight = nn.Parameter(conv.weight * factor.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter((conv.bias - bn.running_mean) * factor + bn.bias)
        folded: nn.Module = conv
        return folded

    registry.register_module("BN", module=nn.BatchNorm2d)
    module(monkeypatch, "mmengine.registry", MODELS=registry)
    folder = module(monkeypatch, "mmcv.cnn.utils.fuse_conv_bn", _fuse_conv_bn=_fuse_conv_bn)

    def fuse_conv_bn(model: nn.Module) -> nn.Module:
        """It writes past ``add_module``, so that nothing is registered."""
        last: Any = None
        for name, child in model.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and last is not None:
                folder._fuse_conv_bn(last, child)
                model._modules[name] = nn.Identity()
            last = child if isinstance(child, nn.Conv2d) else None
        return model

    return types.SimpleNamespace(MODELS=registry, build_norm_layer=build_norm_layer, infer_abbr=infer_abbr, fuse_conv_bn=fuse_conv_bn)


# --------------------------------------------------------------------------------------------------- detectron2 0.6
class FrozenBatchNorm2d(nn.Module):
    """detectron2.layers.FrozenBatchNorm2d."""

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class LayerNorm(nn.Module):
    """detectron2.layers.batch_norm.LayerNorm: over the channels of maps."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))
        self.eps, self.normalized_shape = eps, (normalized_shape,)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


FrozenBatchNorm2d.__module__ = LayerNorm.__module__ = "detectron2.layers.batch_norm"


def get_norm(norm: Any, out_channels: int) -> nn.Module | None:
    """detectron2.layers.get_norm."""
    if norm is None or norm == "":
        return None
    named = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": lambda channels: nn.GroupNorm(32, channels), "LN": LayerNorm}
    made: nn.Module = (named[norm] if isinstance(norm, str) else norm)(out_channels)
    return made


class Conv2d(nn.Conv2d):
    """detectron2.layers.Conv2d: a convolution with ``norm=`` (a module) and ``activation=`` (a callable)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        norm, activation = options.pop("norm", None), options.pop("activation", None)
        super().__init__(*arguments, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and x.numel() == 0 and self.training:
            assert not isinstance(self.norm, torch.nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class BasicBlock(nn.Module):
    """detectron2.modeling.backbone.resnet.BasicBlock: its activations stand outside the wrappers."""

    def __init__(self, channels: int, norm: Any) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1, bias=False, norm=get_norm(norm, channels))
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False, norm=get_norm(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = F.relu_(out)
        out = self.conv2(out)
        out += x
        return F.relu_(out)


# --------------------------------------------------------------------------------------------------- lightning 2.6
class LayerSync(abc.ABC):
    @abc.abstractmethod
    def apply(self, model: nn.Module) -> nn.Module: ...

    @abc.abstractmethod
    def revert(self, model: nn.Module) -> nn.Module: ...


class TorchSyncBatchNorm(LayerSync):
    def apply(self, model: nn.Module) -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        return model


class Callback:
    """lightning.pytorch.Callback, of whose hooks it has those that are used."""

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None: ...

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None: ...


class Trainer:
    """What lightning's does with plugins and callbacks around a fit on several processes."""

    is_global_zero = True

    def __init__(self, sync_batchnorm: bool = False, plugins: Any = (), callbacks: Any = (), **_: Any) -> None:
        self.layer_sync = TorchSyncBatchNorm() if sync_batchnorm else None
        self.callbacks = callbacks
        for plugin in plugins:
            assert isinstance(plugin, LayerSync)
            if sync_batchnorm:
                raise ValueError(f"You set `Trainer(sync_batchnorm=True)` and provided a `{type(plugin).__name__}` plugin")
            self.layer_sync = plugin  # type: ignore[assignment]

    def fit(self, model: Any, steps: Callable[[nn.Module], Any]) -> None:
        for callback in self.callbacks:
            callback.setup(self, model, "fit")
        if self.layer_sync is not None:
            model = self.layer_sync.apply(model)
        for callback in self.callbacks:
            callback.on_fit_start(self, model)
        steps(model)
        if self.layer_sync is not None:
            self.layer_sync.revert(model)


def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "pytorch_lightning"):
        for imported in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, imported)
    module(monkeypatch, "lightning.pytorch.plugins.layer_sync", LayerSync=LayerSync)
    module(monkeypatch, "lightning.pytorch.callbacks.callback", Callback=Callback)


# ------------------------------------------------------------------------------- segmentation_models_pytorch 0.5, 0.6
def segmentation_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``base.modules`` with Conv2dReLU and get_norm_layer."""
    modules: Any = module(monkeypatch, "segmentation_models_pytorch.base.modules", InPlaceABN=None)

    def get_norm_layer(use_norm: Any, out_channels: int) -> nn.Module:
        known: dict[str, Any] = {"type": "inplace", "activation": "leaky_relu", "activation_param": 0.0}
        options = dict(use_norm if isinstance(use_norm, dict) else known if use_norm == "inplace" else {"type": use_norm})
        kind = options.pop("type")
        if kind == "inplace" and modules.InPlaceABN is None:
            raise RuntimeError("In order to use `use_norm='inplace'` the inplace_abn package must be installed.")
        made: nn.Module = {"batchnorm": nn.BatchNorm2d, "inplace": modules.InPlaceABN}[kind](out_channels, **options)
        return made

    class Conv2dReLU(nn.Sequential):
        def __init__(self, in_channels: int, out_channels: int, use_norm: Any = "batchnorm") -> None:
            norm = get_norm_layer(use_norm, out_channels)
            has_act = modules.InPlaceABN is not None and isinstance(norm, modules.InPlaceABN)
            conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            super().__init__(conv, norm, nn.Identity() if has_act else nn.ReLU(inplace=True))

    modules.Conv2dReLU = Conv2dReLU
    return modules
