"""Converters, freezers and folders of other packages know the norm and not its activation: they are stopped before they drop it.

A plain norm, or nothing, that takes the place of a norm with an activation is caught when it is registered (by a hook that
`torch.nn.modules.module` offers for this), whoever does it: torch's and timm's ``convert_sync_batchnorm``, Lightning's
``sync_batchnorm=True``, timm's and detectron2's freezers. Folding into a convolution registers nothing, so torch's functions
for it, and mmcv's once a model is fused, ask here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..activations import IDENTITY, from_module
from ..norms.base import NormActMixin
from .classes import TORCH_NORMS

_lossy: ContextVar[bool] = ContextVar("normfused_lossy_conversion", default=False)
_ASKS = "_normfused_asks"
# functions of (convolution, norm) in any order, looked up by their callers when they are called
_FOLDERS = (
    ("mmcv.cnn.utils.fuse_conv_bn", "_fuse_conv_bn"),
    ("mmcv.cnn.bricks.conv_module", "efficient_conv_bn_eval_forward"),
)
_TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def allow_lossy_conversion() -> Iterator[None]:
    """Within it, a norm with an activation may be replaced by something that drops the activation, which raises otherwise."""
    token = _lossy.set(True)
    try:
        yield
    finally:
        _lossy.reset(token)


def activation_of(module: Any) -> str | None:
    """Name of the activation that a layer of normfused applies, None for none or another module."""
    if not isinstance(module, NormActMixin):
        return None
    if getattr(module, "tau", None) is not None:
        return "tlu"
    act = getattr(module, "act", None)
    if act is None:
        return None
    found = from_module(act) if isinstance(act, nn.Module) else None
    return None if found == IDENTITY else type(act).__name__ if found is None else str(found)


def _on_registration(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    if _lossy.get() or new is None:
        return
    old = parent._modules.get(name)
    if old is not None and old is not new and isinstance(old, NormActMixin):
        act = activation_of(old)
        drops = isinstance(new, (*TORCH_NORMS, nn.Identity)) or "BatchNorm" in type(new).__name__
        if act is not None and drops and not isinstance(new, NormActMixin) and getattr(new, "act", None) is None:
            _refuse(f"replacing {name!r}, a {type(old).__name__}, by a {type(new).__name__}", act, _instead_of(new))
    # a converter that copies the children of a norm to its plain successor
    if name == "act" and type(parent) in _TORCH_BATCH_NORMS:
        _refuse(f"converting a norm to {type(parent).__name__}", type(new).__name__, _instead_of(parent))


def _instead_of(new: nn.Module) -> str:
    name = type(new).__name__
    if isinstance(new, nn.SyncBatchNorm) or "Sync" in name:
        converter = "normfused.convert_sync_batchnorm(model)"
        if not any(package in sys.modules for package in ("lightning.pytorch", "pytorch_lightning")):
            return converter
        plugin = "Trainer(plugins=[normfused.integrations.lightning.NormFusedSyncBatchNorm()])"
        return f"{plugin} in place of sync_batchnorm=True, or {converter}"
    if "Frozen" in name:
        return "normfused.freeze_batch_norm(model)"
    return "normfused.fuse_conv_norm_eval(conv, norm)" if isinstance(new, nn.Identity) else "normfused.unfuse_norms(model) before"


def _refuse(what: str, act: str, instead: str) -> None:
    raise RuntimeError(
        f"{what} would silently drop its fused activation {act}; use {instead} instead, or normfused.unfuse_norms(model) first"
        " (with normfused.allow_lossy_conversion(): if it shall be dropped)"
    )


def _asking_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(layer, norm, ...)``, refused for a norm with an activation."""

    @functools.wraps(function)
    def asking(*args: Any, **kwargs: Any) -> Any:
        for norm in (*args, *kwargs.values()):
            act = activation_of(norm)
            if act is not None and not _lossy.get():
                _refuse(f"{function.__name__} of a {type(norm).__name__}", act, "normfused.fuse_conv_norm_eval(conv, norm)")
        return function(*args, **kwargs)

    setattr(asking, _ASKS, True)
    return asking


def guard_loaded() -> None:
    """Let the functions of other packages that fold a norm without registering anything ask too, if they are imported by now."""
    for module, name in _FOLDERS:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None and not getattr(function, _ASKS, False):
            setattr(sys.modules[module], name, _asking_first(function))


def install() -> None:
    """Once, when the package is imported."""
    register_module_module_registration_hook(_on_registration)
    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        asking = _asking_first(getattr(torch.nn.utils.fusion, name))
        setattr(torch.nn.utils.fusion, name, asking)
        if hasattr(torch.nn.utils, name):
            setattr(torch.nn.utils, name, asking)
