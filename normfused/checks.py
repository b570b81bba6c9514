"""Input checks: one clear error that shows both sides, of the type torch.nn raises and of the natural one.

All checks of a call run before anything is written, so an error leaves running statistics and counters as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ArgumentError", "DTypeError", "DeviceError", "ShapeError"]

_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float64, *_HALF)


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not go together (torch raises either base)."""


class ShapeError(ArgumentError):
    """A tensor has the wrong number of dimensions or elements (torch raises either base)."""


class DTypeError(TypeError, NotImplementedError):
    """A tensor has a type that is not supported there (torch raises NotImplementedError or RuntimeError, its base)."""


class DeviceError(ArgumentError):
    """Tensors of one call lie on different devices (torch raises RuntimeError)."""


def floating(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise DTypeError(f"{op}: input must be float16, bfloat16, float32 or float64, got {_name(x.dtype)}; convert it with .float()")
    if x.layout != torch.jagged and (x.layout != torch.strided or x.is_nested):  # of jagged ones ATen has layer and RMS norm
        kind = "a nested tensor without layout=torch.jagged" if x.is_nested else f"a tensor of {x.layout}"
        raise ArgumentError(f"{op}: input must be a dense tensor, got {kind}")


def min_dim(op: str, x: Tensor, least: int) -> None:
    if x.dim() < least:
        raise ShapeError(f"{op}: input must have at least {least} dimensions, got {x.dim()} (shape {tuple(x.shape)})")


def parameter(op: str, name: str, value: Tensor | None, x: Tensor, shape: Sequence[int] | int) -> None:
    """A parameter or buffer: its shape, and a type that goes with x (its own, or float32 beside a half type)."""
    if value is None:
        return
    if type(shape) is int and isinstance(value, Tensor) and value.numel() == shape and value.dim() == 1:
        if value.dtype != x.dtype or value.device != x.device:
            kind_and_place(op, name, value, x)
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor or None, got {type(value).__name__}")
    if not isinstance(shape, Sequence):  # under torch.jit.trace and a symbolic make_fx the number of channels is no int
        if value.dim() != 1 or value.shape[0] != shape:
            raise ShapeError(f"{op}: {name} must have shape ({shape},) to match the input's channels, got {tuple(value.shape)}")
    elif tuple(value.shape) != tuple(shape):
        raise ShapeError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    kind_and_place(op, name, value, x)


def kind_and_place(op: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype and not (x.dtype in _HALF and value.dtype == torch.float32):
        also = " or float32" if x.dtype in _HALF else ""
        raise DTypeError(f"{op}: {name} must be {_name(x.dtype)}{also} to go with the input, got {_name(value.dtype)}")
    if value.device != x.device:
        raise DeviceError(f"{op}: {name} must be on the input's device {x.device}, got {value.device}")


def statistic(op: str, name: str, value: Tensor | None, x: Tensor, shape: Sequence[int] | int) -> None:
    """A running statistic: a buffer of that shape, in which nothing is differentiable."""
    parameter(op, name, value, x, shape)
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{op}: {name} must be a buffer, in which the norm is not differentiable, got one with requires_grad=True")


def statistics(op: str, mean: Tensor | None, other: Tensor | None, name: str = "running_var", *, needed: str = "") -> None:
    """Both or neither; both, where ``needed`` says when that is."""
    if (mean is None) != (other is None) or (needed and mean is None):
        must = f"be given {needed}" if needed else "both be given or both be None"
        first, second = ("None" if t is None else "a tensor" for t in (mean, other))
        raise ArgumentError(f"{op}: running_mean and {name} must {must}, got running_mean={first} and {name}={second}")


def act_weight(op: str, value: Tensor | None, x: Tensor, channels: int, act_name: str) -> None:
    """The tensor that belongs to PReLU or TLU: one value or one per channel."""
    name = "PReLU's weight" if act_name == "prelu" else "TLU's tau"
    if value is None:
        raise ValueError(f"{op}: act={act_name!r} needs act_param, the tensor of {name}, got None")
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dim() > 1 or value.numel() not in (1, channels):
        raise ShapeError(f"{op}: {name} must have 1 or {channels} elements, got shape {tuple(value.shape)}")
    kind_and_place(op, name, value, x)


def residual(op: str, value: Tensor, x: Tensor, name: str = "residual") -> None:
    """What is added to x, or (another ``name``) stands for it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor{' or None' if name == 'residual' else ''}, got {type(value).__name__}")
    if value.shape != x.shape:
        raise ShapeError(f"{op}: {name} must have the input's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    if value.dtype != x.dtype:
        raise DTypeError(f"{op}: {name} must have the input's type {_name(x.dtype)}, got {_name(value.dtype)}")
    if value.device != x.device:
        raise DeviceError(f"{op}: {name} must be on the input's device {x.device}, got {value.device}")


def number(op: str, name: str, value: object, also: str = "") -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number{also}, got {type(value).__name__}")


def eps(op: str, value: float, *, positive: bool = False) -> None:
    number(op, "eps", value)
    if not (value > 0 if positive else value >= 0):  # so that NaN is refused too
        raise ValueError(f"{op}: eps must be {'positive in training' if positive else 'non-negative'}, got {value}")


def more_than_one_value(op: str, x: Tensor) -> None:
    """Batch statistics of one value have no variance."""
    if x.numel() == x.shape[1] and x.shape[0] == 1:
        raise ValueError(f"{op}: Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")


def more_than_one_position(op: str, x: Tensor) -> None:
    count = 1
    for size in x.shape[2:]:
        count *= size
    if count == 1:
        raise ValueError(f"{op}: Expected more than 1 spatial element when training, got input size {tuple(x.shape)}")


def channels(op: str, x: Tensor, expected: int, dim: int = 1) -> None:
    if x.shape[dim] != expected:
        raise ShapeError(f"{op}: input must have {expected} channels (dim {dim}), got {x.shape[dim]} (shape {tuple(x.shape)})")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
