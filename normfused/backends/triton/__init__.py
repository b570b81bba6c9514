"""The Triton backend: the steps as Triton kernels; the same stems as in the reference hold the same steps.

Importing this package needs no triton: the kernels are loaded with the first call of a step.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .plan import mask_bytes

if TYPE_CHECKING:
    from .host import apply, grad_apply, grad_moments, moments, norm_act, norm_act_backward

__all__ = ["apply", "grad_apply", "grad_moments", "mask_bytes", "moments", "norm_act", "norm_act_backward", "reads", "unavailable"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTERPRET = ("1", "true", "yes", "on")


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"it supports float16, bfloat16, float32 and float64, not {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in _INTERPRET:
        return None
    if device_type != "cuda":
        return f"it needs CUDA tensors, got {device_type} (TRITON_INTERPRET=1 interprets it on the CPU, for tests)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer, got {}.{}".format(*torch.cuda.get_device_capability())
    return None


def reads(t: Tensor) -> bool:
    """One offset serves all tensors of a call (tiles.py); what comes in another layout is copied once."""
    return False


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".host", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
