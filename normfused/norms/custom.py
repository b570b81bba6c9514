"""A norm of your own: a function of per-(n, c) moments that returns scale and shift (route ``slices``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..activations import ActivationLike
from ..problem import POST_ACT, PRE_ACT
from .base import RESIDUAL_MODES, NormActMixin, resolve_act

Rule = Callable[..., tuple[Tensor, Tensor]]


def custom_norm_act(
    x: Tensor,
    rule: Rule,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
) -> Tensor:
    r"""A norm whose rule is written in PyTorch, with the same fused passes over x, forward and backward, as the built-in ones.

    .. math:: y = \mathrm{act}(a_{nc}\, x + b_{nc} \; [+\, r]),\qquad (a, b) = \mathrm{rule}(\mu, v, \text{parameters})

    Args:
        x: (N, C, \*), at least 2 dimensions, float16, bfloat16, float32 or float64, any memory format.
        rule: called as ``rule(mean, var, **parameters)`` with the mean and biased variance of every (n, c), float32 (float64
            for float64) tensors (N, C); returns (scale, shift), each (N, C) or broadcasting to it. Differentiable torch operations;
            its own vjp is taken on these small tensors.
        parameters: tensors passed by name; gradients flow to them. Parameters are usually (C,), which broadcasts to (N, C).
        act, act_param, residual, residual_mode, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, act_param and the parameters, twice; deterministic; scope sample_group (G = C).
    """
    op, parameters = "custom_norm_act", parameters or {}
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: parameter {name} must be a Tensor, got {type(value).__name__}")
    y, _, _ = run_rule(op, x, rule, parameters, act, act_param, residual, residual_mode, backend)
    return y


def run_rule(
    op: str,
    x: Tensor,
    rule: Callable[..., tuple[Any, Any]],
    parameters: Mapping[str, Tensor | None],
    act: ActivationLike,
    act_param: Tensor | None,
    residual: Tensor | None,
    residual_mode: str,
    backend: str | None,
    *,
    centred: bool = False,
    translation: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) of a rule on x, (N, C) and positions; ``centred`` and ``translation`` as in `ops.SliceRule`.

    The rule gets ``parameters`` by name, in the moments' type; None stays None.
    """
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    fused, act_weight, composed = resolve_act(op, act, act_param, x, x.shape[1])
    if residual_mode not in RESIDUAL_MODES:
        raise ValueError(f"{op}: residual_mode must be one of {', '.join(RESIDUAL_MODES)}, got {residual_mode!r}")
    mode = None
    if residual is not None:
        checks.residual(op, residual, x)
        mode = residual_mode
    added_after = None
    if composed is not None and mode == POST_ACT:
        added_after, residual, mode = residual, None, None
    given = {name: value for name, value in parameters.items() if value is not None}
    absent = dict.fromkeys(name for name, value in parameters.items() if value is None)
    for name, value in given.items():
        if value.is_complex():
            raise checks.DTypeError(f"{op}: parameter {name} must be real, got {str(value.dtype).removeprefix('torch.')}")
        if value.device != x.device:
            raise checks.DeviceError(f"{op}: parameter {name} must be on the input's device {x.device}, got {value.device}")

    def positional(mean: Tensor, var: Tensor, *tensors: Tensor) -> tuple[Any, Any]:
        wide = {n: t.to(mean.dtype) if t.is_floating_point() else t for n, t in zip(given, tensors, strict=True)}
        found = rule(mean, var, **wide, **absent)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            got = f"{len(found)} of them" if isinstance(found, (tuple, list)) else type(found).__name__
            raise TypeError(f"{op}: the rule must return two tensors, scale and shift, got {got}")
        return found[0], found[1]

    y, mean, var = ops.slice_norm_act(
        x, ops.SliceRule(positional, centred, translation), tuple(given.values()), residual, act_weight, fused, mode, backend
    )
    if composed is not None:
        y = composed(y)
        if added_after is not None:
            y = y + added_after
    return y, mean, var


class CustomNormAct(NormActMixin, nn.Module):
    """Base of the layers that `define_norm` makes; see there."""

    _rule: Rule
    _initial_parameters: Mapping[str, float]
    _initial_buffers: Mapping[str, float]
    _update: Callable[..., Mapping[str, Tensor]] | None
    _rule_takes_training: bool

    def __init__(
        self,
        num_features: int,
        *,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        accepted = set(inspect.signature(self._rule).parameters) - {"mean", "var", "training"}
        unknown = sorted(set(options) - (accepted - set(self._initial_parameters) - set(self._initial_buffers)))
        if unknown:
            raise TypeError(f"{type(self).__name__}: unexpected keyword arguments {unknown}")
        self.num_features = num_features
        self.options = options
        for name in self._initial_parameters:
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)))
        for name in self._initial_buffers:
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self._init_act(num_features, act, residual_mode, backend, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in (*self._initial_parameters.items(), *self._initial_buffers.items()):
            nn.init.constant_(getattr(self, name), value)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        name = type(self).__name__
        checks.floating(name, input)
        checks.min_dim(name, input, 2)
        checks.channels(name, input, self.num_features)
        options = dict(self.options)
        if self._rule_takes_training:
            options["training"] = self.training
        rule, tensors = self._rule, {n: getattr(self, n) for n in self._initial_parameters}
        if self._initial_buffers:  # copies: an update must not reach what the backward will read
            tensors |= {n: getattr(self, n).clone() for n in self._initial_buffers}

        def with_options(mean: Tensor, var: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
            return rule(mean, var, **given, **options)

        y, mean, var = run_rule(name, input, with_options, tensors, self.act, None, residual, self.residual_mode, self.backend)
        if self.training and self._update is not None and mean is not None:
            with torch.no_grad():
                new = type(self)._update(mean, var, **{n: getattr(self, n) for n in self._initial_buffers})  # type: ignore[misc]
                for buffer, value in new.items():
                    getattr(self, buffer).copy_(value)
        return y

    def extra_repr(self) -> str:
        options = "".join(f", {k}={v}" for k, v in self.options.items())
        return f"{self.num_features}{options}" + super().extra_repr()


def define_norm(
    rule: Rule,
    parameters: Mapping[str, float] | None = None,
    buffers: Mapping[str, float] | None = None,
    update: Callable[..., Mapping[str, Tensor]] | None = None,
    name: str | None = None,
) -> type[CustomNormAct]:
    """A layer class from a rule: module, forward, backward, activation, residual, both layouts, every backend.

    Args:
        rule: ``rule(mean, var, <parameters and buffers by name>, <options with defaults>) -> (scale, shift)``; see
            `custom_norm_act`. If it has an argument ``training``, it is told the module's mode.
        parameters: initial value of each learned (C,) parameter, by name.
        buffers: initial value of each (C,) buffer, by name.
        update: ``update(mean, var, <buffers by name>) -> {name: new value}``, called without gradient after every training step.
        name: the class's name (default: from the rule's name).

    Returns:
        Class with the constructor ``(num_features, *, act=None, residual_mode="pre_act", backend=None, device=None,
        dtype=None, **options of the rule)`` and ``forward(input, residual=None)`` over (N, C, *).

    Raises:
        TypeError: the rule has no argument for a parameter or buffer.
    """
    parameters, buffers = dict(parameters or {}), dict(buffers or {})
    signature = inspect.signature(rule).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    missing = [n for n in (*parameters, *buffers) if n not in signature and not takes_any]
    if missing:
        raise TypeError(f"define_norm: rule {rule.__name__}{tuple(signature)} has no argument for {missing}")
    title = name or "".join(part.capitalize() for part in rule.__name__.removesuffix("_rule").split("_")) + "Norm"
    namespace = {
        "__doc__": rule.__doc__ or f"The norm of the rule {rule.__name__}.",
        "__module__": rule.__module__,
        "_rule": staticmethod(rule),
        "_initial_parameters": parameters,
        "_initial_buffers": buffers,
        "_update": None if update is None else staticmethod(update),
        "_rule_takes_training": "training" in signature,
    }
    return type(title, (CustomNormAct,), namespace)
