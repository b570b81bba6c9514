"""Fused normalization, activation and residual add for PyTorch: one operation, one pass over memory, forward and backward."""

from __future__ import annotations

from . import functional
from .activations import ACTIVATIONS, TLU
from .backends.cuda import set_spare_processors
from .checks import ArgumentError, DeviceError, DTypeError, ShapeError
from .convert import (
    FusionReport,
    allow_lossy_conversion,
    convert_sync_batchnorm,
    freeze_batch_norm,
    fuse_conv_norm_eval,
    fuse_norms,
    unfuse_norms,
)
from .dispatch import available_backends, backend, get_backend, set_backend
from .explain import explain
from .norms.base import get_autocast_policy, set_autocast_policy
from .norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .norms.custom import define_norm
from .norms.filter_response_norm import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from .norms.frozen_batch_norm import FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d
from .norms.group_norm import GroupNormAct
from .norms.instance_norm import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from .norms.layer_norm import LayerNormAct
from .norms.rms_norm import RMSNormAct

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "TLU",
    "ArgumentError",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "DTypeError",
    "DeviceError",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "FusionReport",
    "GroupNormAct",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LayerNormAct",
    "RMSNormAct",
    "ShapeError",
    "allow_lossy_conversion",
    "available_backends",
    "backend",
    "convert_sync_batchnorm",
    "define_norm",
    "explain",
    "freeze_batch_norm",
    "functional",
    "fuse_conv_norm_eval",
    "fuse_norms",
    "get_autocast_policy",
    "get_backend",
    "set_autocast_policy",
    "set_backend",
    "set_spare_processors",
    "unfuse_norms",
]
