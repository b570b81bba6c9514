"""Which class becomes which, and which layers must stay as they are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..norms.base import NormActMixin
from ..norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..norms.filter_response_norm import FilterResponseNorm2d
from ..norms.frozen_batch_norm import FrozenBatchNormAct2d
from ..norms.group_norm import GroupNormAct
from ..norms.instance_norm import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from ..norms.layer_norm import LayerNormAct
from ..norms.rms_norm import RMSNormAct
from .swap import named, record_of

KINDS = ("bn", "in", "gn", "ln", "rms", "frn")
ALREADY = "is normfused's already"
TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Conversion:
    """``kind`` of `KINDS`; ``cls`` and ``attributes`` of the layer it becomes; ``own_act``: the layer brings its activation along."""

    kind: str
    cls: type
    attributes: dict[str, Any]
    own_act: bool = False


_TORCH: dict[type, tuple[str, type]] = {
    nn.BatchNorm1d: ("bn", BatchNormAct1d),
    nn.BatchNorm2d: ("bn", BatchNormAct2d),
    nn.BatchNorm3d: ("bn", BatchNormAct3d),
    nn.InstanceNorm1d: ("in", InstanceNormAct1d),
    nn.InstanceNorm2d: ("in", InstanceNormAct2d),
    nn.InstanceNorm3d: ("in", InstanceNormAct3d),
    nn.GroupNorm: ("gn", GroupNormAct),
    nn.LayerNorm: ("ln", LayerNormAct),
    nn.RMSNorm: ("rms", RMSNormAct),
}
_OVER_CHANNELS = {"dim": 1}
_OVER_LAST = {"dim": -1}
_LIBRARIES: dict[tuple[str, str], tuple[str, type, dict[str, Any]]] = {
    ("timm", "BatchNormAct2d"): ("bn", BatchNormAct2d, {}),
    ("timm", "FrozenBatchNormAct2d"): ("bn", FrozenBatchNormAct2d, {}),
    ("torchvision", "FrozenBatchNorm2d"): ("bn", FrozenBatchNormAct2d, {}),
    ("detectron2", "FrozenBatchNorm2d"): ("bn", FrozenBatchNormAct2d, {}),
    ("detectron2", "LayerNorm"): ("ln", LayerNormAct, {**_OVER_CHANNELS, "elementwise_affine": True}),
    ("timm", "GroupNorm"): ("gn", GroupNormAct, {}),
    ("timm", "GroupNorm1"): ("gn", GroupNormAct, {}),
    ("timm", "GroupNormAct"): ("gn", GroupNormAct, {}),
    ("timm", "GroupNorm1Act"): ("gn", GroupNormAct, {}),
    ("timm", "LayerNorm"): ("ln", LayerNormAct, _OVER_LAST),
    ("timm", "LayerNormAct"): ("ln", LayerNormAct, _OVER_LAST),
    ("timm", "LayerNorm2d"): ("ln", LayerNormAct, _OVER_CHANNELS),
    ("timm", "LayerNormExp2d"): ("ln", LayerNormAct, _OVER_CHANNELS),
    ("timm", "LayerNormAct2d"): ("ln", LayerNormAct, _OVER_CHANNELS),
    ("torchvision", "LayerNorm2d"): ("ln", LayerNormAct, _OVER_CHANNELS),
    ("timm", "RmsNorm"): ("rms", RMSNormAct, _OVER_LAST),
    ("timm", "RmsNorm2d"): ("rms", RMSNormAct, _OVER_CHANNELS),
    ("timm", "RmsNormAct"): ("rms", RMSNormAct, _OVER_LAST),
    ("timm", "FilterResponseNormTlu2d"): ("frn", FilterResponseNorm2d, {}),
    ("timm", "FilterResponseNormAct2d"): ("frn", FilterResponseNorm2d, {"tau": None}),
}

_OWN = frozenset((*(cls for _, cls in _TORCH.values()), *(cls for _, cls, _ in _LIBRARIES.values())))


def class_name(module: nn.Module) -> str:
    """Of a scripted module, that of the module that was scripted."""
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def is_norm(module: nn.Module) -> bool:
    """Whether a report shall speak of the module: a norm by class, or by name and without children that do the work."""
    if isinstance(module, (NormActMixin, *TORCH_NORMS)) or named(_class_of(module)) in _LIBRARIES:
        return True
    own = class_name(module).lower()
    if type(module).__module__.startswith("torch.nn.utils."):  # a parametrization
        return False
    return "norm" in own and own != "localresponsenorm" and not any(is_norm(child) for child in module.children())


def conversion(module: nn.Module) -> Conversion | str:
    """What the norm becomes, or why it stays. A layer of normfused becomes itself: it may still get an activation."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: fuse the norms before scripting"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "lazy, of unknown size: run one batch first"
    if parametrize.is_parametrized(module):
        return "parametrized: its class belongs to torch.nn.utils.parametrize"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if isinstance(module, NormActMixin):
        kind = _kind_of(module)
        # one that was built as it is may get the activation after it too, if its norm is as torch's and it keeps x for the backward
        may_get_more = record_of(module) is not None or ((cls in _OWN or cls is sync_batch_norm_act()) and not module.memory_efficient)
        if not may_get_more or kind is None or module.__dict__.get("act") is not None:
            return ALREADY
        return Conversion(kind, cls, {}, own_act="act" in module._modules)
    if cls is nn.SyncBatchNorm:
        synchronized = sync_batch_norm_act()
        return "SyncBatchNorm stays torch's here" if synchronized is None else Conversion("bn", synchronized, {})
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.momentum is None and module.track_running_stats:
        return "momentum=None: torch's instance norm never updates its statistics then, normfused's averages"
    if cls in _TORCH:
        kind, target = _TORCH[cls]
        return Conversion(kind, target, dict(_OVER_LAST) if kind in ("ln", "rms") else {})
    if named(cls) in _LIBRARIES:
        return _of_library(module)
    base = next((b for b in _TORCH if isinstance(module, b)), None)
    if base is not None or isinstance(module, TORCH_NORMS):
        return (
            f"a subclass of {'torch' if base is None else 'nn.' + base.__name__}'s with code of its own"
            if base is None
            else (f"a subclass of nn.{base.__name__} from {cls.__module__}, whose code is not known")
        )
    return f"{cls.__module__}.{cls.__name__} is not a norm that has a fused form"


def _of_library(module: nn.Module) -> Conversion | str:
    kind, target, extra = _LIBRARIES[named(type(module))]
    drop = module._modules.get("drop")
    if drop is not None and type(drop) is not nn.Identity:
        return f"{type(drop).__name__} stands between the norm and its activation"
    attributes = dict(extra)
    if kind == "frn":
        if not getattr(module, "rms", True):
            return "rms=False: divides by the deviation, which filter response norm does not"
        tau = getattr(module, "tau", None)
        attributes |= {"num_features": _size(module.weight), "tlu": tau is not None, "learnable_eps": False, "eps_l": None}
    if target is FrozenBatchNormAct2d:
        attributes["num_features"] = _size(module.weight)
    return Conversion(kind, target, attributes, own_act="act" in module._modules)


def _size(value: Any) -> int:
    return int(value.shape[0])


def _class_of(module: nn.Module) -> type:
    record = record_of(module)
    return type(module) if record is None else record.original


def _kind_of(module: nn.Module) -> str | None:
    bases: dict[str, Any] = {"bn": (nn.modules.batchnorm._BatchNorm, FrozenBatchNormAct2d), "in": nn.modules.instancenorm._InstanceNorm}
    bases |= {"gn": nn.GroupNorm, "ln": nn.LayerNorm, "rms": nn.RMSNorm, "frn": FilterResponseNorm2d}
    return next((kind for kind, base in bases.items() if isinstance(module, base)), None)


def sync_batch_norm_act() -> type | None:
    """`SyncBatchNormAct`, imported when it is needed: it brings torch.distributed along."""
    try:
        found: type = importlib.import_module("normfused.norms.sync_batch_norm").SyncBatchNormAct
    except ModuleNotFoundError:
        return None
    return found
