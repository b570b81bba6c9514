"""Norms and activations as plain float64 formulas under autograd; nothing here calls a kernel of the library or a norm of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import normfused.functional as NF

ACT_NUMBERS: dict[str, dict[str, float]] = {
    "leaky_relu": {"negative_slope": 0.2},
    "elu": {"alpha": 1.3},
    "softplus": {"beta": 1.5, "threshold": 4.0},
}


def activation(name: str, z: Tensor, weight: Tensor | None = None, numbers: dict[str, float] | None = None) -> Tensor:
    """act(z); ``weight`` already broadcasts against z."""
    n = ACT_NUMBERS.get(name, {}) if numbers is None else numbers
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    if name == "identity":
        return z
    if name == "relu":
        return torch.where(z > 0, z, zero)
    if name == "relu6":
        return torch.where(z > 6, zero + 6, torch.where(z > 0, z, zero))
    if name == "leaky_relu":
        return torch.where(z > 0, z, n["negative_slope"] * z)
    if name == "prelu":
        assert weight is not None
        return torch.where(z > 0, z, weight * z)
    if name == "elu":
        return torch.where(z > 0, z, n["alpha"] * torch.expm1(torch.where(z > 0, zero, z)))
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    if name == "silu":
        return z / (1 + torch.exp(-z))
    if name == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    if name in ("hardswish", "hardsigmoid"):
        gate = torch.where(z >= 3, zero + 1, torch.where(z <= -3, zero, (z + 3) / 6))
        return gate if name == "hardsigmoid" else z * gate
    if name == "tanh":
        return torch.tanh(z)
    if name == "mish":
        return z * torch.tanh(torch.log1p(torch.exp(z)))
    if name == "softplus":
        scaled = z * n["beta"]
        large = scaled > n["threshold"]
        return torch.where(large, z, torch.log1p(torch.exp(torch.where(large, zero, scaled))) / n["beta"])
    if name == "tlu":
        assert weight is not None
        return torch.where(z < weight, weight, z)
    raise AssertionError(name)


@dataclass(frozen=True)
class Kind:
    """One norm as the tests see it: how to call the public function, and which elements share statistics."""

    name: str
    dims: str  # "channel" | "group" | "rows" | "channels"
    rms: bool = False
    groups: int = 1
    frozen: bool = False
    bias: bool = True
    trailing: int = 1  # rows: how many trailing dimensions
    learned_eps: str | None = None
    eps: float = 1e-5
    shape: tuple[int, ...] = (3, 6, 5, 3)
    pre_norm: bool = False
    spatial: bool = False  # needs more than one position
    buffers: bool = field(default=False)

    @property
    def scope(self) -> str:
        """The library's word for it."""
        return {"channel": "channel", "group": "sample_group"}.get(self.dims, "position")

    def features(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of weight and bias."""
        return tuple(shape[-self.trailing :]) if self.dims == "rows" else (shape[1],)

    def broadcast(self, parameter: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """A parameter of one or all features against x."""
        if parameter is None or parameter.numel() == 1:
            return parameter
        if self.dims == "rows":
            return parameter.reshape(self.features(shape))
        return parameter.view(1, -1, *[1] * (len(shape) - 2))

    def modes(self) -> tuple[str | None, ...]:
        return (None, "pre_act", "post_act", *(("pre_norm",) if self.pre_norm else ()))

    def call(self, x: Tensor, a: Arguments, backend: str | None = None, **more: Any) -> Any:
        """The public function."""
        act: Any = a.act
        if a.act in ACT_NUMBERS:
            act = (a.act, ACT_NUMBERS[a.act])
        kw: dict[str, Any] = {"act": act, "act_param": a.act_weight, "residual": a.residual, "backend": backend}
        if a.mode is not None:
            kw["residual_mode"] = a.mode
        kw.update(more)
        if self.dims == "channel" and self.name.startswith("batch"):
            momentum = kw.pop("momentum", 0.1)
            return NF.batch_norm_act(x, a.running_mean, a.running_var, a.weight, a.bias, not self.frozen, momentum, self.eps, **kw)
        if self.name.startswith("instance"):
            momentum = kw.pop("momentum", 0.1)
            return NF.instance_norm_act(x, a.running_mean, a.running_var, a.weight, a.bias, not self.frozen, momentum, self.eps, **kw)
        if self.name.startswith("frn"):
            if kw["act"] == "identity":
                kw["act"] = None
            return NF.filter_response_norm(x, a.weight, a.bias, None, self.eps, eps_l=a.eps_l, **kw)
        if self.dims == "group":
            return NF.group_norm_act(x, self.groups, a.weight, a.bias, self.eps, **kw)
        dim = 1 if self.dims == "channels" else -1
        if self.rms:
            return NF.rms_norm_act(x, self.features(tuple(x.shape)), a.weight, self.eps, dim=dim, **kw)
        return NF.layer_norm_act(x, self.features(tuple(x.shape)), a.weight, a.bias, self.eps, dim=dim, **kw)

    def normalized(self, x: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
        """(x - mean)*rstd and rstd, which broadcasts against x."""
        shape = x.shape
        if self.frozen:
            assert a.running_mean is not None and a.running_var is not None
            mean, var = (self.broadcast(t.to(x.dtype), tuple(shape)) for t in (a.running_mean, a.running_var))
            assert mean is not None and var is not None
            rstd = (var + self.eps) ** -0.5
            return (x - mean) * rstd, rstd
        if self.dims == "group":
            groups = shape[1] if self.groups == 0 else self.groups
            x = x.reshape(shape[0], groups, shape[1] // groups, *shape[2:])
            over = list(range(2, x.dim()))
        elif self.dims == "channel":
            over = [d for d in range(x.dim()) if d != 1]
        elif self.dims == "channels":
            over = [1]
        else:
            over = list(range(x.dim() - self.trailing, x.dim()))
        mean = torch.zeros_like(x.mean(over, keepdim=True)) if self.rms else x.mean(over, keepdim=True)
        var = (x - mean).square().mean(over, keepdim=True)
        eps: Any = self.eps
        if a.eps_l is not None:
            eps = self.eps + a.eps_l.abs().view(1, -1, *[1] * (x.dim() - 2))
        rstd = (var + eps) ** -0.5
        hat = (x - mean) * rstd
        return hat.reshape(shape), rstd.expand_as(x).reshape(shape)

    def oracle(self, x: Tensor, a: Arguments, storage: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, h, z, p): h the normalized tensor, z before the activation, p = dz/dx of fixed statistics.

        In pre_norm mode h = x + residual, which is an output and is normalized as it is stored, in the type of x (``storage``).
        """
        h = x
        if a.mode == "pre_norm" and a.residual is not None:
            h = x + a.residual
            h = h + (h.detach().to(storage).double() - h.detach())
        hat, rstd = self.normalized(h, a)
        shape = tuple(x.shape)
        w, b = self.broadcast(a.weight, shape), self.broadcast(a.bias, shape)
        z = hat if w is None else hat * w
        z = z if b is None else z + b
        if a.mode == "pre_act" and a.residual is not None:
            z = z + a.residual
        y = activation(a.act, z, self.broadcast(a.act_weight, shape))
        if a.mode == "post_act" and a.residual is not None:
            y = y + a.residual
        return y, h, z, (rstd if w is None else rstd * w).detach()


@dataclass
class Arguments:
    """The tensors beside x; every one may be None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    act: str = "identity"
    act_weight: Tensor | None = None
    residual: Tensor | None = None
    mode: str | None = None
    eps_l: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None

    TENSORS = ("weight", "bias", "act_weight", "residual", "eps_l")

    def named(self) -> dict[str, Tensor]:
        return {n: t for n in self.TENSORS if (t := getattr(self, n)) is not None}

    def wide(self) -> Arguments:
        """The same numbers in float64, as new leaves that require what these require."""
        made = {n: t.detach().to(torch.float64, copy=True).requires_grad_(t.requires_grad) for n, t in self.named().items()}
        running = {
            n: t.detach().to(torch.float64, copy=True) for n in ("running_mean", "running_var") if (t := getattr(self, n)) is not None
        }
        return replace(self, **made, **running)


KINDS = (
    Kind("batch", "channel"),
    Kind("batch_eval", "channel", frozen=True, buffers=True),
    Kind("group_1", "group", groups=1),
    Kind("group_3", "group", groups=3),
    Kind("group_C", "group", groups=6),
    Kind("instance", "group", groups=0, spatial=True),
    Kind("instance_eval", "channel", frozen=True, buffers=True),
    Kind("layer_rows", "rows", pre_norm=True, shape=(3, 4, 2, 7)),
    Kind("layer_rows2", "rows", trailing=2, pre_norm=True, shape=(3, 4, 3, 5)),
    Kind("layer_channels", "channels", pre_norm=True),
    Kind("rms_rows", "rows", rms=True, bias=False, pre_norm=True, shape=(3, 4, 2, 7)),
    Kind("rms_channels", "channels", rms=True, bias=False, pre_norm=True),
    Kind("frn", "group", rms=True, groups=0, eps=1e-6),
    Kind("frn_eps1", "group", rms=True, groups=0, eps=1e-6, learned_eps="scalar"),
    Kind("frn_epsC", "group", rms=True, groups=0, eps=1e-6, learned_eps="channel"),
)
BY_NAME = {k.name: k for k in KINDS}
