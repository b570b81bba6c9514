"""What the norms with statistics of their own share: pooling of moments, moving averages, and the part of a layer that keeps them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..activations import ActivationLike
from .base import NormActMixin, take_other_shapes


def positions(x: Tensor) -> int:
    """Number of positions S of x (N, C, *)."""
    count = 1
    for size in x.shape[2:]:
        count *= size
    return count


def momentum_factor(momentum: float | None, counter: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The weight of a new value; of the cumulative average 1/counter, which is read on its device."""
    if momentum is not None:
        return momentum
    return 1.0 if counter is None else counter.to(dtype).reciprocal()


@torch.no_grad()
def track(momentum: float | None, counter: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """One training step: the counter goes first, then each running <- (1 - m)*running + m*value, in value's type, rounded once.

    A value of None (an empty batch has none) leaves its statistic as it was.
    """
    if counter is not None:
        counter.add_(1)
    for running, value in pairs:
        if running is not None and value is not None:
            factor = momentum_factor(momentum, counter, value.dtype)
            running.copy_(torch.lerp(running.to(value.dtype), value.detach().reshape(running.shape), factor))


def need_counter(op: str, momentum: float | None, counter: Tensor | None) -> None:
    """What an update of running statistics asks for."""
    if momentum is not None:
        checks.number(op, "momentum", momentum, " or None")
    elif counter is None:
        raise ValueError(f"{op}: momentum=None averages over all batches and needs num_batches_tracked, got None")


def per_channel(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Checks tensors of C elements; what is called running_* is a statistic."""
    for name, value in tensors.items():
        (checks.statistic if name.startswith("running_") else checks.parameter)(op, name, value, x, x.shape[1])


def frozen_copy(t: Tensor, x: Tensor) -> Tensor:
    """A statistic as a rule reads it: in the type of x's moments, and out of reach of later updates, since the backward reads it again."""
    return ops.snapshot(t).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def known_to_be(value: float, *tensors: Tensor) -> bool:
    """Whether all elements have this value, where that can be asked for nothing: on the CPU, while nobody traces."""
    if torch.compiler.is_compiling() or ops.see_through():
        return False
    return all(t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) and bool((t == value).all()) for t in tensors)


class TrackedNormAct(NormActMixin, nn.Module):
    """Parameters, running statistics and counter of a layer whose class torch does not have.

    Subclasses say which statistics they keep and what these begin with, and take (N, C, *) of ``_dimensions``.
    """

    _dimensions: ClassVar[tuple[int, ...]] = ()
    _statistics: ClassVar[Mapping[str, float]] = {"running_mean": 0.0, "running_var": 1.0}

    eps: Any  # a float; None where the norm has none
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float | None,
        momentum: float | None,
        weight: bool,
        bias: bool,
        track_running_stats: bool,
        device: Any,
        dtype: Any,
        act: ActivationLike,
        residual_mode: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        for name, wanted in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None)
        for name in self._statistics:
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype) if track_running_stats else None)
        counter = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self._init_act(num_features, act, residual_mode, backend, device, dtype)

    def reset_running_stats(self) -> None:
        """Running statistics and counter as at the beginning."""
        if self.track_running_stats:
            for name, value in self._statistics.items():
                getattr(self, name).fill_(value)
            cast(Tensor, self.num_batches_tracked).zero_()

    def _check_input(self, input: Tensor) -> None:
        name = type(self).__name__
        checks.floating(name, input)
        if input.dim() not in self._dimensions:
            allowed = " or ".join(f"{d}D" for d in self._dimensions)
            raise checks.ShapeError(f"{name}: expected {allowed} input (got {input.dim()}D input)")
        checks.channels(name, input, self.num_features)

    def _epilogue(self, residual: Tensor | None) -> dict[str, Any]:
        return {"act": self.act, "residual": residual, "residual_mode": self.residual_mode, "backend": self.backend}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Also takes the shapes of the reference implementations, (1, C, 1, 1) and the like, and checkpoints without a counter."""
        take_other_shapes(self, state_dict, prefix)
        if self.num_batches_tracked is not None:
            state_dict.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _own_repr(self) -> str:
        """What a subclass adds to its print, each part after a comma."""
        return ""

    def extra_repr(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps}"
        return f"{self.num_features}{eps}, momentum={self.momentum}{self._own_repr()}" + super().extra_repr()


def batch_norm_options(kind: type, bn: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ``kind`` for a layer in place of ``bn``; ``options`` win.

    Raises:
        TypeError: bn is no batch norm. ValueError: it keeps no running statistics.
    """
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"{kind.__name__}.from_batch_norm: must be given a batch norm layer, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{kind.__name__}.from_batch_norm: the layer must keep running statistics, got track_running_stats=False")
    taken: dict[str, Any] = {"num_features": bn.num_features, "eps": bn.eps, "affine": bn.affine}
    taken |= {"device": bn.running_mean.device, "dtype": bn.running_mean.dtype}
    taken["bias"] = not bn.affine or bn.bias is not None
    if isinstance(bn, NormActMixin):
        taken |= {"act": copy.deepcopy(bn.act), "residual_mode": bn.residual_mode, "backend": bn.backend}
    return taken | options


@torch.no_grad()
def copy_parameters(target: nn.Module, bn: nn.Module) -> None:
    """Weight, bias, running mean, counter and mode of ``bn``."""
    for name in ("weight", "bias", "running_mean", "num_batches_tracked"):
        own, given = getattr(target, name), getattr(bn, name)
        if own is not None and given is not None:
            own.copy_(given)
            if isinstance(own, nn.Parameter):
                own.requires_grad_(given.requires_grad)
    target.train(bn.training)
