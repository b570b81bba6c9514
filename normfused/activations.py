"""The activations that are fused, how a user may name one, and their PyTorch forms.

An `Activation` is a name and at most two numbers, so that it can travel through an operator schema. PReLU's weight and
TLU's threshold are tensors and travel beside it (``act_weight``: one value or one per channel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "IDENTITY", "TLU", "Activation", "parse"]

ActivationLike = Union[None, str, "tuple[str, dict[str, Any]]", "Activation", nn.Module, Callable[[Tensor], Tensor]]

# name -> default (p0, p1); the meaning of p0 and p1 is given by the names of _PARAMETER_NAMES.
ACTIVATIONS: dict[str, tuple[float, float]] = {
    "identity": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "relu6": (0.0, 0.0),
    "leaky_relu": (0.01, 0.0),
    "prelu": (0.0, 0.0),
    "elu": (1.0, 0.0),
    "silu": (0.0, 0.0),
    "gelu": (0.0, 0.0),
    "gelu_tanh": (0.0, 0.0),
    "hardswish": (0.0, 0.0),
    "hardsigmoid": (0.0, 0.0),
    "sigmoid": (0.0, 0.0),
    "tanh": (0.0, 0.0),
    "mish": (0.0, 0.0),
    "softplus": (1.0, 20.0),
    "tlu": (0.0, 0.0),
}
_PARAMETER_NAMES = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
_ALIASES = {"none": "identity", "linear": "identity", "swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid"}


@dataclass(frozen=True)
class Activation:
    """A fused activation: ``name`` of `ACTIVATIONS`, ``p0`` and ``p1`` its numbers (negative_slope, alpha, beta, threshold)."""

    name: str
    p0: float = 0.0
    p1: float = 0.0

    @property
    def takes_weight(self) -> bool:
        """Whether a tensor belongs to it (PReLU's slope, TLU's threshold)."""
        return self.name in ("prelu", "tlu")

    @property
    def has_two_slopes(self) -> bool:
        """Whether the derivative takes two values, so that one bit of an element tells it."""
        return self.name in ("relu", "relu6", "leaky_relu", "hardsigmoid", "tlu")

    def derivative_from_y(self, dtype: torch.dtype) -> bool:
        """Whether act'(z) follows from y = act(z) as it is stored in ``dtype``.

        relu6 and hardsigmoid saturate at a value that half precision also rounds neighbours to, and the derivatives of elu and
        softplus follow y's rounding (2e-3 in a bfloat16 net's parameter gradients, measured), so there z is needed.
        """
        if self.name in ("relu6", "hardsigmoid", "elu", "softplus") and dtype in (torch.float16, torch.bfloat16):
            return False
        if self.name in ("leaky_relu", "elu"):
            return self.p0 > 0
        if self.name == "softplus":  # between z and the threshold y does not tell the branch; the slopes differ by exp(-threshold)
            return self.p1 >= 16
        return self.name in ("relu", "relu6", "hardsigmoid")

    def __str__(self) -> str:
        names = _PARAMETER_NAMES.get(self.name, ())
        numbers = ", ".join(f"{n}={v:g}" for n, v in zip(names, (self.p0, self.p1), strict=False))
        return f"{self.name}({numbers})" if numbers else self.name


IDENTITY = Activation("identity")


class TLU(nn.Module):
    r"""Thresholded linear unit, :math:`y = \max(z, \tau_c)`; a tie y = tau counts as z.

    Args:
        num_features: number of channels C (dim 1 of the input), or 1 for one shared threshold.
        init: initial threshold (default 0: equal to ReLU at the start).

    Shape: (N, C, \*) in and out; ``tau`` is (C,).
    Reference: Singh & Krishnan, *Filter Response Normalization Layer*, arXiv 1911.09737.
    """

    def __init__(self, num_features: int, init: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.init = init
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.tau, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, Activation("tlu"), self.tau)

    def extra_repr(self) -> str:
        return str(self.num_features)


# ----------------------------------------------------------------------------------------------------- naming one
_RELU, _RELU6, _PRELU, _SILU, _GELU, _GELU_TANH = (Activation(n) for n in ("relu", "relu6", "prelu", "silu", "gelu", "gelu_tanh"))
_MODULES: dict[type, Callable[[Any], Activation]] = {
    nn.Identity: lambda m: IDENTITY,
    nn.ReLU: lambda m: _RELU,
    nn.ReLU6: lambda m: _RELU6,
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.PReLU: lambda m: _PRELU,
    nn.ELU: lambda m: Activation("elu", float(m.alpha)),
    nn.SiLU: lambda m: _SILU,
    nn.GELU: lambda m: _GELU if m.approximate == "none" else _GELU_TANH,
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Mish: lambda m: Activation("mish"),
    nn.Softplus: lambda m: Activation("softplus", float(m.beta), float(m.threshold)),
    TLU: lambda m: Activation("tlu"),
}
_FUNCTIONS: dict[Any, Activation] = {
    torch.relu: Activation("relu"),
    torch.relu_: Activation("relu"),
    F.relu: Activation("relu"),
    F.relu6: Activation("relu6"),
    F.leaky_relu: Activation("leaky_relu", 0.01),
    F.elu: Activation("elu", 1.0),
    F.silu: Activation("silu"),
    F.gelu: Activation("gelu"),
    F.hardswish: Activation("hardswish"),
    F.hardsigmoid: Activation("hardsigmoid"),
    F.sigmoid: Activation("sigmoid"),
    torch.sigmoid: Activation("sigmoid"),
    F.tanh: Activation("tanh"),
    torch.tanh: Activation("tanh"),
    F.mish: Activation("mish"),
    F.softplus: Activation("softplus", 1.0, 20.0),
}
_NAMED = {name: Activation(name, *numbers) for name, numbers in ACTIVATIONS.items()}
_NAMED.update({alias: _NAMED[name] for alias, name in _ALIASES.items()})


def from_module(module: nn.Module) -> Activation | None:
    """The fused equivalent of a torch activation module, or None if it has none (subclass, hooks, unknown type)."""
    make = _MODULES.get(type(module))
    if make is None or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    return make(module)


def parse(act: ActivationLike) -> Activation | Callable[[Tensor], Tensor]:
    """Resolve what a user gave as ``act``.

    Args:
        act: None or a name of `ACTIVATIONS`; ``(name, {parameter: number})``; a torch activation module or its class; any callable.

    Returns:
        An `Activation` if it is fused, else the callable itself, which is composed after the norm.

    Raises:
        ValueError: unknown name or parameter.
        TypeError: neither of the above.
    """
    if act is None:
        return IDENTITY
    if isinstance(act, Activation):
        return act
    if isinstance(act, str):
        return _named(act)
    if isinstance(act, (tuple, list)):
        if len(act) != 2 or not isinstance(act[0], str) or not isinstance(act[1], dict):
            raise TypeError(f"act: a pair must be (name, dict of parameters), got {act!r}")
        return _with_parameters(act[0], act[1])
    act = _instance(act)
    if isinstance(act, nn.Module):
        return from_module(act) or act
    if isinstance(act, type):
        raise TypeError(f"act: must be None, a name, (name, parameters), a module or a callable, got the class {act.__name__}")
    if callable(act):
        try:
            return _FUNCTIONS.get(act, act)
        except TypeError:  # unhashable callable
            return act
    raise TypeError(f"act: must be None, a name, (name, parameters), a module or a callable, got {type(act).__name__}")


def _instance(act: Any) -> Any:
    """A class of modules as one of its objects."""
    return act() if isinstance(act, type) and issubclass(act, nn.Module) else act


def _named(name: str) -> Activation:
    found = _NAMED.get(name) or _NAMED.get(name.lower())
    if found is None:
        raise ValueError(f"act: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return found


def _with_parameters(name: str, parameters: dict[str, Any]) -> Activation:
    base = _named(name)
    given = {k: v for k, v in parameters.items() if k != "inplace"}
    if base.name in ("gelu", "gelu_tanh") and set(given) <= {"approximate"}:
        approximate = given.get("approximate", "none" if base.name == "gelu" else "tanh")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"act: gelu's approximate must be 'none' or 'tanh', got {approximate!r}")
        return _NAMED["gelu" if approximate == "none" else "gelu_tanh"]
    names = _PARAMETER_NAMES.get(base.name, ())
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"act: {base.name} has parameters {list(names)}, got {unknown}")
    numbers = [float(given.get(n, d)) for n, d in zip(names, (base.p0, base.p1), strict=False)]
    return Activation(base.name, *numbers)


class Composed(nn.Module):
    """A callable that is not fused, held by a layer as its ``act`` and run after the norm."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def module_of(act: ActivationLike, channels: int, device: Any = None, dtype: Any = None) -> nn.Module | None:
    """The module that a layer keeps as its child ``act`` (None for no activation), so that print, state_dict and hooks see it."""
    act = _instance(act)
    if isinstance(act, nn.Module):
        return act
    parsed = parse(act)
    if not isinstance(parsed, Activation):
        return Composed(parsed)
    p0, p1 = parsed.p0, parsed.p1
    make: dict[str, Callable[[], nn.Module | None]] = {
        "identity": lambda: None,
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "leaky_relu": lambda: nn.LeakyReLU(p0),
        "prelu": lambda: nn.PReLU(device=device, dtype=dtype),
        "elu": lambda: nn.ELU(p0),
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU("tanh"),
        "hardswish": nn.Hardswish,
        "hardsigmoid": nn.Hardsigmoid,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "mish": nn.Mish,
        "softplus": lambda: nn.Softplus(p0, p1),
        "tlu": lambda: TLU(channels, device=device, dtype=dtype),
    }
    return make[parsed.name]()


def weight_of(module: nn.Module | None) -> Tensor | None:
    """The tensor that belongs to a fused activation module: PReLU's weight, TLU's tau."""
    if type(module) is nn.PReLU:
        return module.weight
    return module.tau if type(module) is TLU else None


# ------------------------------------------------------------------------------------------------- PyTorch forms
def per_channel(weight: Tensor, x: Tensor) -> Tensor:
    """weight of shape (1,) or (C,) shaped to broadcast along dim 1 of x; one that has x's dimensions already is left as it is."""
    if weight.numel() == 1 or x.dim() < 2 or weight.dim() == x.dim():
        return weight
    return weight.view(1, -1, *[1] * (x.dim() - 2))


def activate(z: Tensor, act: Activation, weight: Tensor | None = None, *, inplace: bool = False) -> Tensor:
    """act(z) by differentiable PyTorch operations; ``inplace`` may overwrite z where autograd allows it."""
    name = act.name
    if name == "identity":
        return z
    if name == "relu":
        return torch.relu_(z) if inplace else torch.relu(z)
    if name == "relu6":
        return F.relu6(z, inplace)
    if name == "leaky_relu":
        # torch refuses the in-place backward for a negative slope
        return F.leaky_relu(z, act.p0, inplace and act.p0 >= 0)
    if name == "prelu":
        assert weight is not None
        if weight.numel() == 1 or (weight.dim() == 1 and z.dim() > 1):  # all that F.prelu knows
            return F.prelu(z, weight.reshape(-1).to(z.dtype))
        return torch.where(z > 0, z, per_channel(weight.to(z.dtype), z) * z)
    if name == "elu":
        return F.elu(z, act.p0, inplace and act.p0 >= 0)
    if name == "silu":
        return F.silu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "hardswish":
        return F.hardswish(z)
    if name == "hardsigmoid":
        return F.hardsigmoid(z)
    if name == "sigmoid":
        return torch.sigmoid_(z) if inplace else torch.sigmoid(z)
    if name == "tanh":
        return torch.tanh_(z) if inplace else torch.tanh(z)
    if name == "mish":
        return F.mish(z)
    if name == "softplus":
        return F.softplus(z, act.p0, act.p1)
    if name == "tlu":
        assert weight is not None
        tau = per_channel(weight.to(z.dtype), z)
        # not torch.maximum, whose gradient splits ties in half; here a tie, like a NaN, belongs to z
        return torch.where(z < tau, tau, z)
    raise AssertionError(name)


def grad_activate(dy: Tensor, z: Tensor, act: Activation, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(dz, dL/dweight of every element) for y = act(z); plain operations, not differentiable twice.

    The second is None unless a weight belongs to the activation; the caller sums it.
    """
    name = act.name
    if name == "identity":
        return dy, None
    if name in ("prelu", "tlu"):
        assert weight is not None
        slope = per_channel(weight.to(z.dtype), z)
        zero = dy.new_zeros(())
        if name == "prelu":
            negative = z <= 0
            return torch.where(negative, slope * dy, dy), torch.where(negative, z * dy, zero)
        below = z < slope
        return torch.where(below, zero, dy), torch.where(below, dy, zero)
    return dy * derivative(z, act), None


def derivative(z: Tensor, act: Activation) -> Tensor:
    """act'(z), written out (an operator's kernel runs below autograd and cannot ask it)."""
    name, one, zero = act.name, z.new_ones(()), z.new_zeros(())
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    if name == "leaky_relu":
        return torch.where(z > 0, one, act.p0)
    if name == "elu":
        return torch.where(z > 0, one, act.p0 * torch.exp(z))
    if name == "hardsigmoid":
        return ((z > -3) & (z < 3)).to(z.dtype) / 6
    if name == "hardswish":
        return torch.where(z < -3, zero, torch.where(z <= 3, z / 3 + 0.5, one))
    if name == "softplus":
        return torch.where(z * act.p0 > act.p1, one, torch.sigmoid(z * act.p0))
    if name == "tanh":
        return 1 - torch.tanh(z) ** 2
    if name == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        k, c = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(k * (z + c * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * c * z * z)
    sigmoid = torch.sigmoid(z)
    if name == "sigmoid":
        return sigmoid * torch.sigmoid(-z)
    if name == "silu":
        return sigmoid * (1 + z * torch.sigmoid(-z))
    if name == "mish":
        t = torch.tanh(F.softplus(z))
        return t + z * (1 - t * t) * sigmoid
    raise AssertionError(name)


def grad_activate_from_y(dy: Tensor, y: Tensor, act: Activation) -> Tensor:
    """dz from y = act(z), for the activations whose y determines the derivative (`Activation.derivative_from_y`)."""
    name, zero = act.name, dy.new_zeros(())
    if name == "relu":
        return torch.where(y > 0, dy, zero)
    if name == "relu6":
        return torch.where((y > 0) & (y < 6), dy, zero)
    if name == "leaky_relu":
        return torch.where(y > 0, dy, dy * act.p0)
    if name == "elu":
        return torch.where(y > 0, dy, dy * (y + act.p0))
    if name == "hardsigmoid":
        return torch.where((y > 0) & (y < 1), dy / 6, zero)
    if name == "softplus":
        return torch.where(y * act.p0 > act.p1, dy, -dy * torch.expm1(-act.p0 * y))
    raise AssertionError(name)
