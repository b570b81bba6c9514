"""Activations on tensors that autograd does not see: forward over z's own memory, backward by ATen's one-pass kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import Activation, activate, grad_activate, per_channel

_aten = torch.ops.aten


def activate_(z: Tensor, act: Activation, weight: Tensor | None) -> Tensor:
    """act(z), in place where ATen can."""
    name = act.name
    if name == "silu":
        return F.silu(z, inplace=True)
    if name in ("gelu", "gelu_tanh"):
        _aten.gelu_(z, approximate="none" if name == "gelu" else "tanh")
        return z
    if name == "hardswish":
        return F.hardswish(z, inplace=True)
    if name == "hardsigmoid":
        return F.hardsigmoid(z, inplace=True)
    if name == "mish":
        return F.mish(z, inplace=True)
    if name == "tlu":
        assert weight is not None
        return z.clamp_(min=per_channel(weight.to(z.dtype), z))
    return activate(z, act, weight, inplace=True)


def grad_activate_(dy: Tensor, z: Tensor, act: Activation, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dz, every element's gradient of the weight); may overwrite z."""
    name = act.name
    if name == "relu":
        return _aten.threshold_backward(dy, z, 0), None
    if name == "relu6":
        return _aten.hardtanh_backward(dy, z, 0.0, 6.0), None
    if name == "leaky_relu":
        return _aten.leaky_relu_backward(dy, z, act.p0, False), None
    if name == "elu":
        return _aten.elu_backward(dy, act.p0, 1.0, 1.0, False, z), None
    if name == "silu":
        return _aten.silu_backward(dy, z), None
    if name in ("gelu", "gelu_tanh"):
        return _aten.gelu_backward(dy, z, approximate="none" if name == "gelu" else "tanh"), None
    if name == "hardswish":
        return _aten.hardswish_backward(dy, z), None
    if name == "hardsigmoid":
        return _aten.hardsigmoid_backward(dy, z), None
    if name == "sigmoid":
        return _aten.sigmoid_backward(dy, z.sigmoid_()), None
    if name == "tanh":
        return _aten.tanh_backward(dy, z.tanh_()), None
    if name == "mish":
        return _aten.mish_backward(dy, z), None
    if name == "softplus":
        return _aten.softplus_backward(dy, z, act.p0, act.p1), None
    if name == "tlu":
        assert weight is not None
        below = z < per_channel(weight.to(z.dtype), z)
        dz = torch.where(below, 0.0, dy)  # masked_fill copies and drops channels_last
        return dz, dy - dz
    return grad_activate(dy, z, act, weight)
