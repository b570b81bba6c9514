"""Batch norms synchronized, frozen or folded into a convolution, with the activation they apply."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..norms.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..norms.frozen_batch_norm import FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d
from .classes import Conversion, conversion, sync_batch_norm_act
from .swap import record_of, swap, twin

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_OWN = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)
_FROZEN = (FrozenBatchNormAct1d, FrozenBatchNormAct2d, FrozenBatchNormAct3d)


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` for models with fused norms: the activations stay.

    Batch norms of torch.nn, of timm and of normfused become `SyncBatchNormAct` where they stand, the same objects.

    Args:
        model: converted in place.
        process_group: default None, all processes.

    Returns:
        ``model``.

    Raises:
        RuntimeError: this build has no `SyncBatchNormAct`. A warning names batch norms that stay, and why.
    """
    target = sync_batch_norm_act()
    if target is None:
        raise RuntimeError(
            "convert_sync_batchnorm: normfused.norms.sync_batch_norm must be importable, got a torch without torch.distributed"
        )
    for name, layer in model.named_modules():
        if not isinstance(layer, _BATCH_NORM):
            continue
        if isinstance(layer, target):
            layer.process_group = process_group
        elif type(layer) in _OWN:
            layer.__class__ = target
            layer.process_group = process_group
            _remember(layer)
        elif (attributes := _attributes(name, layer)) is not None:
            swap(layer, target, **attributes)
            layer.process_group = process_group
            _remember(layer)
    return model


def _is_own(layer: nn.Module) -> bool:
    """Whether it is one of normfused's that in evaluation is a fixed affine map; other norms of its are batch norms too by class."""
    return type(layer) in (*_OWN, *_FROZEN, sync_batch_norm_act())


def _remember(layer: Any) -> None:
    """On the way back, what was a batch norm of torch or normfused is a synchronized one; another package's is its own again."""
    record = record_of(layer)
    if record is not None and record.original in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        record.original = nn.SyncBatchNorm
    elif record is not None and record.original in _OWN:
        record.original = type(layer)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Fix the statistics and coefficients of every batch norm: they become `FrozenBatchNormAct2d` (1d, 3d), with their activations.

    The layers stay the same objects; their parameters become buffers (copies: an optimizer that still has the parameters changes
    nothing), so that they are trained no more, and ``num_batches_tracked`` goes. Synchronized layers become 2-D.

    Args:
        model: frozen in place.

    Returns:
        ``model``.

    Raises:
        ValueError: a batch norm without running statistics, which have no value to fix; nothing is changed. A warning names batch norms
            that stay, and why.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _BATCH_NORM)]
    for name, layer in layers:
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"freeze_batch_norm: {name or 'the layer'} must have running statistics, got track_running_stats=False")
    for name, layer in layers:
        if not _is_own(layer):
            attributes = _attributes(name, layer)
            if attributes is None:
                continue
            layer.__dict__.update(attributes)
        _freeze(layer)
    return model


def _attributes(name: str, layer: nn.Module) -> dict[str, Any] | None:
    """What the layer needs beside its own to be one of normfused's; a warning and None if its code is not known."""
    found = conversion(layer)
    if not isinstance(found, Conversion):
        warnings.warn(f"{name or type(layer).__name__} stays as it is: {found}", stacklevel=3)
        return None
    own = layer._modules.get("act")
    held = None if own is None else twin(own)
    # without an entry of its own, `act` is the child
    act = {"act": held} if own is None or held is not None else {}
    return {"residual_mode": "pre_act", "backend": None, **found.attributes, **act}


def _freeze(layer: Any) -> None:
    like: Tensor = layer.running_mean
    weight = torch.ones_like(like) if layer.weight is None else layer.weight.detach().clone()
    bias = torch.zeros_like(like) if layer.bias is None else layer.bias.detach().clone()
    statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    for name in ("weight", "bias"):
        del layer._parameters[name]
    layer._buffers.clear()
    layer._buffers.update({"weight": weight, "bias": bias, **statistics})
    layer._non_persistent_buffers_set.clear()
    dimensions = {nn.BatchNorm1d: FrozenBatchNormAct1d, nn.BatchNorm3d: FrozenBatchNormAct3d}
    layer.__class__ = next((cls for base, cls in dimensions.items() if isinstance(layer, base)), FrozenBatchNormAct2d)
    record = record_of(layer)
    if record is not None:
        # the way back takes the activation off and leaves a frozen layer
        record.original = type(layer)
        record.added, record.replaced = (("act",), {}) if "act" in layer._modules else ((), {"act": None})


def fuse_conv_norm_eval(conv: nn.Module, norm: nn.Module) -> nn.Module:
    r"""Fold a batch norm in evaluation into the convolution before it, and keep its activation.

    .. math:: W' = W \gamma_c/\sqrt{v_c + \epsilon},\quad b' = (b - \mu_c)\,\gamma_c/\sqrt{v_c + \epsilon} + \beta_c

    Args:
        conv: ``torch.nn.Conv*d`` or ``ConvTranspose*d`` (with groups too), in evaluation.
        norm: ``torch.nn.BatchNorm*d``, ``BatchNormAct*d``, ``FrozenBatchNormAct*d`` and the like, in evaluation, with statistics.

    Returns:
        A copy of ``conv``; ``nn.Sequential(copy, activation)`` where the norm applies one.

    Raises:
        TypeError: other layers. ValueError: in training, without statistics, or with another number of channels.
    """
    if not isinstance(conv, _ConvNd):
        raise TypeError(f"fuse_conv_norm_eval: conv must be a convolution of torch.nn, got {type(conv).__name__}")
    if not isinstance(norm, (_BATCH_NORM, *_FROZEN)):
        raise TypeError(f"fuse_conv_norm_eval: norm must be a batch norm or a frozen one, got {type(norm).__name__}")
    if conv.training or (norm.training and not isinstance(norm, _FROZEN)):
        raise ValueError(
            f"fuse_conv_norm_eval: both must be in evaluation, got conv.training={conv.training}, norm.training={norm.training}"
        )
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("fuse_conv_norm_eval: norm must have running statistics, got track_running_stats=False")
    if norm.num_features != conv.out_channels:
        raise ValueError(f"fuse_conv_norm_eval: norm must have the convolution's {conv.out_channels} channels, got {norm.num_features}")
    if not _is_own(norm) and not isinstance(conversion(norm), Conversion):
        raise TypeError(f"fuse_conv_norm_eval: norm must be of a known class, got one that {conversion(norm)}")
    fused = copy.deepcopy(conv)
    with torch.no_grad():
        scale = (var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -mean.double() * scale if norm.bias is None else norm.bias.double() - mean.double() * scale
        if conv.bias is not None:
            shift = shift + conv.bias.double() * scale
        weight = conv.weight.double()
        if isinstance(conv, _ConvTransposeNd):  # (C_in, C_out/groups, *): the output channels of a group lie along dim 1
            per_group = weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = per_group.flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        kind = conv.weight
        fused.weight = nn.Parameter(weight.to(kind.dtype), kind.requires_grad)
        fused.bias = nn.Parameter(shift.to(kind.dtype), kind.requires_grad if conv.bias is None else conv.bias.requires_grad)
    act = getattr(norm, "act", None)
    return fused if act is None or type(act) is nn.Identity else nn.Sequential(fused, copy.deepcopy(cast(nn.Module, act))).eval()
