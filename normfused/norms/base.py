"""What every norm shares: resolving the activation, checking the residual, and the part of a layer that is not torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks, dispatch, ops, rebuild
from ..activations import IDENTITY, Activation, ActivationLike, Composed, from_module, module_of, parse, weight_of
from ..problem import POST_ACT, PRE_ACT, PRE_NORM

RESIDUAL_MODES = (PRE_ACT, POST_ACT)
RESIDUAL_MODES_ROWS = (PRE_ACT, POST_ACT, PRE_NORM)

_autocast_policy = "keep"


def set_autocast_policy(policy: str) -> None:
    """What layer, group and RMS norm do with half inputs under CUDA autocast.

    ``"keep"`` (default): the output has the input's type; sums and coefficients are float32 inside. ``"torch"``: the input is
    cast to float32 and so is the output, as ``torch.nn`` does. Batch and instance norm keep the type under both, as torch's do.
    """
    global _autocast_policy
    if policy not in ("keep", "torch"):
        raise ValueError(f"set_autocast_policy: policy must be 'keep' or 'torch', got {policy!r}")
    _autocast_policy = policy


def get_autocast_policy() -> str:
    """The policy set by `set_autocast_policy`."""
    return _autocast_policy


def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in float32 where policy "torch" wants that, else as they are; the first decides."""
    x = tensors[0]
    if _autocast_policy == "torch" and isinstance(x, Tensor) and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return tuple(t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)
    return tensors


def resolve_act(op: str, act: ActivationLike, act_param: Tensor | None, x: Tensor, channels: int) -> tuple[Activation, Tensor | None, Any]:
    """(fused activation, its tensor, callable to compose after the norm or None)."""
    composed: Any = None
    if isinstance(act, Activation):
        fused = act
    elif isinstance(act, nn.Module):
        found = from_module(act)
        if found is None:
            fused, composed = IDENTITY, act
        else:
            fused = found
            if act_param is None:
                act_param = weight_of(act)
    else:
        parsed = parse(act)
        if isinstance(parsed, Activation):
            fused = parsed
        else:
            fused, composed = IDENTITY, parsed
    if fused.takes_weight:
        checks.act_weight(op, act_param, x, channels, fused.name)
        return fused, act_param, composed
    return fused, None, composed


def call(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scope: str,
    rule: str,
    groups: int,
    eps: float,
    act: ActivationLike,
    act_param: Tensor | None,
    residual: Tensor | None,
    residual_mode: str,
    backend: str | None,
    *,
    modes: tuple[str, ...] = RESIDUAL_MODES,
    rule_weight: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    counter: Tensor | None = None,
    batch_statistics: bool = True,
    momentum: float | None = 0.0,
    normalized_shape: tuple[int, ...] | None = None,
    memory_efficient: bool = False,
    bounds: ops.Bounds | None = None,
    run: Callable[..., tuple[Tensor, Tensor | None]] = ops.norm_act,
) -> Any:
    """Run a checked norm on x (N, C, *), or, with ``normalized_shape``, over trailing dimensions; (y, h) in pre_norm mode, else y.

    ``run`` has the arguments of `ops.norm_act`, as has `rebuild.norm_act`, which keeps y for the backward.
    """
    channels = x.shape[1] if normalized_shape is None else math.prod(normalized_shape)
    fused, act_weight, composed = (IDENTITY, None, None) if act is None else resolve_act(op, act, act_param, x, channels)
    if residual_mode not in modes:
        raise ValueError(f"{op}: residual_mode must be one of {', '.join(modes)}, got {residual_mode!r}")
    mode: str | None = None
    if residual is not None:
        checks.residual(op, residual, x)
        mode = residual_mode
    added_after = None
    if composed is not None and mode == POST_ACT:
        added_after, residual, mode = residual, None, None
    if memory_efficient:
        rebuild.check(op, fused, x.dtype, mode)
        run = rebuild.norm_act
    more = {} if bounds is None else {"bounds": bounds}
    y, h = run(
        x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, counter,
        scope, rule, groups, batch_statistics, eps, momentum, fused, mode, backend, normalized_shape, **more,
    )  # fmt: skip
    if composed is not None:
        y = composed(y)
        if added_after is not None:
            y = y + added_after
    if residual_mode == PRE_NORM:
        return y, (x if h is None else h)
    return y


def own(module: Any, name: str) -> Tensor | None:
    """``module.name`` for a parameter, without the detour that nn.Module's attributes take; a parametrized one is no longer registered."""
    parameters: dict[str, Tensor | None] = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def take_other_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Gives what a checkpoint holds as (1, C, 1, 1) and the like the module's own shapes."""
    for name, own in (*module._parameters.items(), *module._buffers.items()):
        given = state_dict.get(prefix + name)
        if own is not None and isinstance(given, Tensor) and given.shape != own.shape and given.squeeze().shape == own.squeeze().shape:
            state_dict[prefix + name] = given.reshape(own.shape)


def known_backend(op: str, backend: str | None) -> None:
    if backend is not None and backend not in ("auto", *dispatch.BACKENDS):
        raise ValueError(f"{op}: unknown backend {backend!r}; known: auto, {', '.join(dispatch.BACKENDS)}")


class NormActMixin:
    """The part of a layer that torch's class does not have: ``act`` (a child module or None), ``residual_mode``, ``backend``."""

    act: nn.Module | None
    residual_mode: str
    backend: str | None
    memory_efficient: bool = False

    def _init_act(
        self,
        channels: int,
        act: ActivationLike,
        residual_mode: str,
        backend: str | None,
        device: Any,
        dtype: Any,
        *,
        bias: bool = True,
        modes: tuple[str, ...] = RESIDUAL_MODES,
        memory_efficient: bool = False,
    ) -> None:
        module = cast(nn.Module, self)
        name = type(self).__name__
        if residual_mode not in modes:
            raise ValueError(f"{name}: residual_mode must be one of {', '.join(modes)}, got {residual_mode!r}")
        known_backend(name, backend)
        checks.eps(name, getattr(self, "eps", None) or 0.0)
        if not bias:
            # torch has bias= for these layers from 2.13 on; this is the same on every version
            module.register_parameter("bias", None)
        if memory_efficient:
            fused = parse(act)
            if isinstance(fused, Activation):  # a callable that is composed comes after what is kept
                rebuild.check_activation(name, fused)
            self.memory_efficient = True
            # channels whose weight was too near 0, summed over training forwards; no part of a checkpoint
            module.register_buffer("near_zero", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.act = module_of(act, channels, device, dtype)
        self.residual_mode = residual_mode
        self.backend = backend

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics 0 and 1, whichever there are; the activation's own parameters are left alone."""
        reset_running_stats: Callable[[], None] | None = getattr(self, "reset_running_stats", None)
        if reset_running_stats is not None:
            reset_running_stats()
        if self.memory_efficient:
            cast(Tensor, self.near_zero).zero_()  # type: ignore[attr-defined]
        if getattr(self, "weight", None) is not None:
            nn.init.ones_(cast(Tensor, self.weight))  # type: ignore[attr-defined]
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(cast(Tensor, self.bias))  # type: ignore[attr-defined]

    def _keeps_y(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """``memory_efficient``, having looked whether the weights allow it: on the host at the first training forward, where they do
        not raise a ValueError by the layer's name, and after that by a count on the device, which `explain` shows."""
        if not self.memory_efficient:
            return False
        module = cast(nn.Module, self)
        if weight is None or not module.training or not torch.is_grad_enabled() or x.is_meta:
            return True
        with torch.no_grad():
            near = rebuild.too_near_zero(weight, bias, x.dtype)
            captured = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
            if not (captured or self._looked_at_weights):
                self._raise_if_any(near, weight, bias, x.dtype)
                self._looked_at_weights = True
            cast(Tensor, module.near_zero).add_(near.sum())
        return True

    _looked_at_weights = False

    def _raise_if_any(self, near: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        found = near.flatten().nonzero().flatten()
        if found.numel():
            first = int(found[0])
            values = f"weight {float(weight.flatten()[first]):.3g}"
            if bias is not None:
                values += f" and bias {float(bias.flatten()[first]):.3g}"
            raise ValueError(
                f"{type(self).__name__}({self.extra_repr()}): memory_efficient=True finds x from y as (y - bias)/weight, so the weight must"
                f" not be near 0 beside {str(dtype).removeprefix('torch.')}'s rounding of y, got {values} in channel {first} (and"
                f" {found.numel() - 1} more of {near.numel()}); initialize it otherwise or use memory_efficient=False"
            )

    def extra_repr(self) -> str:
        own = ["fused"]
        act = getattr(self, "act", None)
        if act is not None:
            found = from_module(act)
            own.append(
                f"act={found}"
                if found is not None
                else f"act={act.extra_repr() if isinstance(act, Composed) else type(act).__name__} (composed)"
            )
        if self.residual_mode != PRE_ACT:
            own.append(f"residual_mode={self.residual_mode}")
        if self.memory_efficient:
            own.append("memory_efficient")
        if self.backend not in (None, "auto"):
            own.append(f"backend={self.backend}")
        return ", ".join([super().extra_repr(), *own])  # type: ignore[misc]
