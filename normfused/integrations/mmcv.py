"""mmcv and mmengine: normfused's norms as types of ``norm_cfg``.

``norm_cfg=dict(type="NormFusedBN2d", act="relu")`` with ``act_cfg=None`` is norm and activation in one. Configs that exist need none of
this: `normfused.fuse_norms` of the model knows mmcv's ``ConvModule``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..convert.guards import guard_loaded
from ..norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..norms.filter_response_norm import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from ..norms.frozen_batch_norm import FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d
from ..norms.group_norm import GroupNormAct
from ..norms.instance_norm import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from ..norms.layer_norm import LayerNormAct
from ..norms.rms_norm import RMSNormAct
from ..norms.sync_batch_norm import SyncBatchNormAct
from ._common import make, required

__all__ = ["TYPES", "register"]


def _made_as(kind: str, base: type, abbreviation: str) -> type:
    """A class for a registry, which calls it with the number of channels first and reads the layer's name off it; it makes ``base``'s own
    objects, so that models and their pickles hold nothing of this module."""

    def new(cls: type, num_features: int, **options: Any) -> nn.Module:
        return make(kind, num_features, **options)

    return type(f"NormFused{kind.upper()}", (base,), {"__new__": new, "_abbr_": abbreviation, "__module__": __name__})


_PLAIN: dict[str, type] = {
    "BN": BatchNormAct2d, "BN1d": BatchNormAct1d, "BN2d": BatchNormAct2d, "BN3d": BatchNormAct3d, "SyncBN": SyncBatchNormAct,
    "IN": InstanceNormAct2d, "IN1d": InstanceNormAct1d, "IN2d": InstanceNormAct2d, "IN3d": InstanceNormAct3d,
    "LN": LayerNormAct, "RMS": RMSNormAct,
    "FRN": FilterResponseNorm2d, "FRN1d": FilterResponseNorm1d, "FRN2d": FilterResponseNorm2d, "FRN3d": FilterResponseNorm3d,
    "FrozenBN": FrozenBatchNormAct2d, "FrozenBN1d": FrozenBatchNormAct1d,
    "FrozenBN2d": FrozenBatchNormAct2d, "FrozenBN3d": FrozenBatchNormAct3d,
}  # fmt: skip
# group norm takes the groups first; the 2-D ones normalize over the channels of maps, not over the last dimension
_MADE = {"GN": ("gn", GroupNormAct, "gn"), "LN2d": ("ln2d", LayerNormAct, "ln"), "RMS2d": ("rms2d", RMSNormAct, "norm_layer")}
#: what is registered, by the name for ``type=``
TYPES: dict[str, type] = {f"NormFused{name}": cls for name, cls in _PLAIN.items()}
TYPES |= {f"NormFused{name}": _made_as(*made) for name, made in _MADE.items()}


def register(registry: Any = None) -> tuple[str, ...]:
    """Make `TYPES` known as types of ``norm_cfg``, after mmcv's own under the prefix ``NormFused``: ``NormFusedBN2d``, ``NormFusedGN``, ...

    Calling it again changes nothing. From then on mmcv's ``fuse_conv_bn`` and ``efficient_conv_bn_eval``, which know the norm and not its
    activation, raise instead of dropping it.

    Args:
        registry: a registry with mmengine's interface; default None, ``mmengine.registry.MODELS``, which mmcv and its projects look in.

    Returns:
        The names.

    Raises:
        ImportError: no mmengine. KeyError: one of the names is somebody else's in the registry.
    """
    if registry is None:
        registry = required("mmengine.registry", "mmengine").MODELS
    taken: Callable[[str], Any] = registry.module_dict.get
    for name, cls in TYPES.items():
        if taken(name) is not cls:
            registry.register_module(name=name, module=cls)
    guard_loaded()
    return tuple(TYPES)
