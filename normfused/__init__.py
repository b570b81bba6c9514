"""Fused normalization, activation and residual add for PyTorch: one operation, one pass over memory, forward and backward."""

from __future__ import annotations

from . import diagnostics, functional, integrations, parametrizations
from .activations import ACTIVATIONS, TLU
from .backends.cuda import set_spare_processors
from .checks import ArgumentError, DeviceError, DTypeError, ShapeError
from .compiling import compile_mode, get_compile_mode, set_compile_mode
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
from .norms.batch_instance_norm import (
    BatchInstanceNormAct1d,
    BatchInstanceNormAct2d,
    BatchInstanceNormAct3d,
    clamp_gates_,
    gate_parameter_groups,
    gates,
)
from .norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .norms.batch_renorm import BatchRenormAct1d, BatchRenormAct2d, BatchRenormAct3d
from .norms.custom import define_norm
from .norms.eval_norm import EvalNorm1d, EvalNorm2d, EvalNorm3d
from .norms.filter_response_norm import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from .norms.frozen_batch_norm import FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d
from .norms.group_norm import GroupNormAct
from .norms.instance_norm import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from .norms.iter_norm import IterNorm1d, IterNorm2d, IterNorm3d
from .norms.layer_norm import LayerNormAct
from .norms.mean_only_batch_norm import (
    MeanOnlyBatchNormAct1d,
    MeanOnlyBatchNormAct2d,
    MeanOnlyBatchNormAct3d,
    data_dependent_init,
    fold_mean_only_batch_norm,
)
from .norms.rms_norm import RMSNormAct
from .norms.switch_norm import SwitchNormAct1d, SwitchNormAct2d, SwitchNormAct3d
from .norms.sync_batch_norm import SyncBatchNormAct
from .rescale import InputBias, RescaledResidual, rescale_init_, rescale_parameter_groups, rescale_schedule
from .rescalenet import RescaleNet, rescalenet, rescalenet18, rescalenet50, rescalenet_init_

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "TLU",
    "ArgumentError",
    "BatchInstanceNormAct1d",
    "BatchInstanceNormAct2d",
    "BatchInstanceNormAct3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenormAct1d",
    "BatchRenormAct2d",
    "BatchRenormAct3d",
    "DTypeError",
    "DeviceError",
    "EvalNorm1d",
    "EvalNorm2d",
    "EvalNorm3d",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "FusionReport",
    "GroupNormAct",
    "InputBias",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "LayerNormAct",
    "MeanOnlyBatchNormAct1d",
    "MeanOnlyBatchNormAct2d",
    "MeanOnlyBatchNormAct3d",
    "RMSNormAct",
    "RescaleNet",
    "RescaledResidual",
    "ShapeError",
    "SwitchNormAct1d",
    "SwitchNormAct2d",
    "SwitchNormAct3d",
    "SyncBatchNormAct",
    "allow_lossy_conversion",
    "available_backends",
    "backend",
    "clamp_gates_",
    "compile_mode",
    "convert_sync_batchnorm",
    "data_dependent_init",
    "define_norm",
    "diagnostics",
    "explain",
    "fold_mean_only_batch_norm",
    "freeze_batch_norm",
    "functional",
    "fuse_conv_norm_eval",
    "fuse_norms",
    "gate_parameter_groups",
    "gates",
    "get_autocast_policy",
    "get_backend",
    "get_compile_mode",
    "integrations",
    "parametrizations",
    "rescale_init_",
    "rescale_parameter_groups",
    "rescale_schedule",
    "rescalenet",
    "rescalenet18",
    "rescalenet50",
    "rescalenet_init_",
    "set_autocast_policy",
    "set_backend",
    "set_compile_mode",
    "set_spare_processors",
    "unfuse_norms",
]
