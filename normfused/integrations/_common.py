"""What the integrations share: a norm by its short name, and another package by its own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..activations import ActivationLike
from ..norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..norms.filter_response_norm import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from ..norms.frozen_batch_norm import FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d
from ..norms.group_norm import GroupNormAct
from ..norms.instance_norm import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from ..norms.layer_norm import LayerNormAct
from ..norms.rms_norm import RMSNormAct
from ..norms.sync_batch_norm import SyncBatchNormAct

_BY_DIMENSION: dict[str, tuple[type, type, type]] = {
    "bn": (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d),
    "in": (InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d),
    "frn": (FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d),
    "frozen_bn": (FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d),
}
_OTHERS: dict[str, Callable[..., nn.Module]] = {
    "sync_bn": SyncBatchNormAct,
    "gn": lambda channels, num_groups=32, group_size=None, **options: GroupNormAct(
        num_groups if group_size is None else channels // group_size, channels, **options
    ),
    "ln": LayerNormAct,
    "ln2d": lambda channels, **options: LayerNormAct(channels, dim=1, **options),
    "rms": RMSNormAct,
    "rms2d": lambda channels, **options: RMSNormAct(channels, dim=1, **options),
}
KINDS = (*_BY_DIMENSION, *_OTHERS)


def check_kind(where: str, kind: Any) -> None:
    """Raises a ValueError for what `make` does not know."""
    if not (kind in KINDS if isinstance(kind, str) else isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, or a class of normfused's, got {kind!r}")


def make(kind: str | type, channels: int, act: ActivationLike = None, dimensions: int = 2, **options: Any) -> nn.Module:
    """The layer of that kind, of `KINDS` or a class that takes the number of channels, with ``options`` of its constructor.

    Group norm has 32 groups by default, or as many as ``group_size`` makes. FRN has its threshold, TLU, where no activation is given.
    A module given as ``act`` is copied, so that layers do not share it.
    """
    if isinstance(act, nn.Module):
        act = copy.deepcopy(act)
    if not isinstance(kind, str):
        made: nn.Module = kind(channels, act=act, **options)
        return made
    if kind == "frn" and act is not None:
        options.setdefault("tlu", False)
    build = _BY_DIMENSION[kind][dimensions - 1] if kind in _BY_DIMENSION else _OTHERS[kind]
    return build(channels, act=act, **options)


def required(name: str, pip: str) -> Any:
    """The module ``name`` of another package; one sentence where it cannot be had.

    Raises:
        ImportError: with what to install, and what Python said.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"normfused.integrations: {name} must be importable (pip install {pip}), got: {error}") from error
