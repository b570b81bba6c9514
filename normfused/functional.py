"""The norms as functions, in the argument order of `torch.nn.functional`; new arguments are keyword-only."""

from .epilogues import act_bias, affine_act, rescaled_residual
from .norms.batch_instance_norm import batch_instance_norm_act
from .norms.batch_norm import batch_norm_act
from .norms.batch_renorm import batch_renorm_act
from .norms.custom import custom_norm_act
from .norms.eval_norm import eval_norm_act
from .norms.filter_response_norm import filter_response_norm
from .norms.group_norm import group_norm_act
from .norms.instance_norm import instance_norm_act
from .norms.iter_norm import iter_norm_act
from .norms.layer_norm import layer_norm_act
from .norms.mean_only_batch_norm import mean_only_batch_norm_act
from .norms.rms_norm import rms_norm_act
from .norms.switch_norm import switch_norm_act
from .norms.sync_batch_norm import sync_batch_norm_act

__all__ = [
    "act_bias",
    "affine_act",
    "batch_instance_norm_act",
    "batch_norm_act",
    "batch_renorm_act",
    "custom_norm_act",
    "eval_norm_act",
    "filter_response_norm",
    "group_norm_act",
    "instance_norm_act",
    "iter_norm_act",
    "layer_norm_act",
    "mean_only_batch_norm_act",
    "rescaled_residual",
    "rms_norm_act",
    "switch_norm_act",
    "sync_batch_norm_act",
]
