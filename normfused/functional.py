"""The norms as functions, in the argument order of `torch.nn.functional`; new arguments are keyword-only."""

from .epilogues import act_bias, affine_act, rescaled_residual
from .norms.batch_norm import batch_norm_act
from .norms.custom import custom_norm_act
from .norms.filter_response_norm import filter_response_norm
from .norms.group_norm import group_norm_act
from .norms.instance_norm import instance_norm_act
from .norms.layer_norm import layer_norm_act
from .norms.rms_norm import rms_norm_act

__all__ = [
    "act_bias",
    "affine_act",
    "batch_norm_act",
    "custom_norm_act",
    "filter_response_norm",
    "group_norm_act",
    "instance_norm_act",
    "layer_norm_act",
    "rescaled_residual",
    "rms_norm_act",
]
