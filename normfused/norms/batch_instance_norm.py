"""Batch-instance normalization: a learned mixture of batch and instance norm (rule batch_instance; where ATen runs, in PyTorch)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ops, rules
from ..activations import ActivationLike
from ..problem import BATCH_INSTANCE, CHANNEL, PRE_ACT, STANDARD
from .base import call
from .custom import run_rule
from .tracked import TrackedNormAct, frozen_copy, known_to_be, need_counter, per_channel, positions, track


def batch_instance_norm_act(
    x: Tensor,
    gate: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Batch-instance norm, activation and residual add; the two branches are one affine map and never materialise.

    .. math:: y = \mathrm{act}\Big(\gamma_c \Big[\rho_c \frac{x - \mu_c}{\sqrt{v_c + \epsilon}}
              + (1 - \rho_c) \frac{x - \mu_{nc}}{\sqrt{v_{nc} + \epsilon}}\Big] + \beta_c \; [+\, r]\Big)

    In training :math:`\mu_c, v_c` are the batch's and the running statistics are updated as in `batch_norm_act`; otherwise they are the
    running statistics. The instance's statistics are always its own. The gate is used as it is; see `clamp_gates_`.

    Args:
        x: (N, C, \*) with more than one position, float16, bfloat16, float32 or float64, any memory format.
        gate: (C,), meant to lie in [0, 1].
        running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked: as in `batch_norm_act`.
        act, act_param, residual, residual_mode, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: one position. ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, gate, weight, bias, act_param, twice; deterministic. Evaluation of gates that are all 1 is one pass on
    the CPU, if no gradient of them is wanted.

    Reference: Nam & Kim, *Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks*, arXiv 1805.07925.
    """
    op = "batch_instance_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.eps(op, eps, positive=training)
    if not isinstance(gate, Tensor):
        raise TypeError(f"{op}: gate must be a Tensor, got {type(gate).__name__}")
    per_channel(op, x, gate=gate, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    checks.more_than_one_position(op, x)
    checks.statistics(op, running_mean, running_var, needed="" if training else "when training=False")
    if training:
        if running_mean is not None:
            need_counter(op, momentum, num_batches_tracked)
    else:
        assert running_mean is not None and running_var is not None
        if not (gate.requires_grad and torch.is_grad_enabled()) and known_to_be(1.0, gate):
            y: Tensor = call(
                op, x, weight, bias, CHANNEL, STANDARD, 1, eps, act, act_param, residual, residual_mode, backend,
                running_mean=frozen_copy(running_mean, x), running_var=frozen_copy(running_var, x), batch_statistics=False,
            )  # fmt: skip
            return y
    if ops.has_kernels(x, backend, CHANNEL, BATCH_INSTANCE):
        y = call(
            op, x, weight, bias, CHANNEL, BATCH_INSTANCE, 1, eps, act, act_param, residual, residual_mode, backend, rule_weight=gate,
            running_mean=running_mean, running_var=running_var, counter=num_batches_tracked if training else None,
            batch_statistics=training, momentum=momentum,
        )  # fmt: skip
        return y
    parameters = {"gate": gate, "weight": weight, "bias": bias, "batch_mean": None, "batch_rstd": None}
    if not training:
        assert running_mean is not None and running_var is not None
        parameters |= {"batch_mean": frozen_copy(running_mean, x), "batch_rstd": (frozen_copy(running_var, x) + eps).rsqrt()}
    rule = partial(rules.batch_instance, eps=eps)
    y, mean, var = run_rule(op, x, rule, parameters, act, act_param, residual, residual_mode, backend, centred=True)
    if training:
        batch_mean = batch_var = None
        if mean is not None and var is not None:
            count = x.shape[0] * positions(x)
            batch_mean, batch_var = rules.pooled(mean, var, 0)
            batch_var = batch_var * (count / (count - 1))
        track(momentum, num_batches_tracked, (running_mean, batch_mean), (running_var, batch_var))
    return y


class _BatchInstanceNormAct(TrackedNormAct):
    gate: nn.Parameter
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, affine and bias, track_running_stats, device, dtype, act, residual_mode, backend
        )
        self.gate = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self._mark_gate()
        self.reset_parameters()

    def _mark_gate(self) -> None:
        self.gate.bin_gate = True  # type: ignore[attr-defined]  # what optimizers of the reference implementation look for

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_gate()  # deepcopy drops attributes of parameters

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, gate 1, running statistics 0 and 1."""
        super().reset_parameters()
        nn.init.ones_(self.gate)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(input)
        batch_statistics = self.training or self.running_mean is None
        counter = self.num_batches_tracked
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        return batch_instance_norm_act(
            input, self.gate, self.running_mean, self.running_var, self.weight, self.bias, batch_statistics, momentum, self.eps,
            num_batches_tracked=counter, **self._epilogue(residual),
        )  # type: ignore[arg-type]  # fmt: skip

    def _own_repr(self) -> str:
        return f", affine={self.weight is not None}, track_running_stats={self.track_running_stats}"


def gates(model: nn.Module) -> list[nn.Parameter]:
    """The gates of all batch-instance norms of a model, each once."""
    found = {id(m.gate): m.gate for m in model.modules() if isinstance(m, _BatchInstanceNormAct)}
    return list(found.values())


@torch.no_grad()
def clamp_gates_(model: nn.Module | Iterable[Tensor]) -> None:
    """Clamps the gates of a model (or the given tensors) to [0, 1], all in one call each way; to be called after every optimizer step."""
    tensors: list[Tensor] = [*(gates(model) if isinstance(model, nn.Module) else model)]
    if tensors:
        torch._foreach_clamp_min_(tensors, 0.0)
        torch._foreach_clamp_max_(tensors, 1.0)


def gate_parameter_groups(model: nn.Module, lr: float, gate_lr_factor: float = 10.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, as the reference implementation trains: gates learn faster and do not decay.

    Args:
        model: whose parameters are all taken, each once.
        lr: learning rate of the others.
        gate_lr_factor: how much larger that of the gates is (default 10).

    Returns:
        ``[{"params": others, "lr": lr}, {"params": gates, "lr": gate_lr_factor*lr, "weight_decay": 0.0}]``; the second if there are any.
    """
    own = gates(model)
    known = {id(gate) for gate in own}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in known], "lr": lr}]
    return [*groups, {"params": own, "lr": gate_lr_factor * lr, "weight_decay": 0.0}] if own else groups


_DOC = r"""Batch-instance norm over {shape} with a fused activation and residual add; see `batch_instance_norm_act` for the formula.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as `torch.nn.BatchNorm{d}d`; the gate stays with
            affine=False.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: weight 1, bias 0, gate 1, running_mean 0, running_var 1, all (C,), num_batches_tracked; the reference implementation's.
    To train as it does: `gate_parameter_groups` for the optimizer, `clamp_gates_` after its steps.

    Reference: Nam & Kim, *Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks*, arXiv 1805.07925.
    """


class BatchInstanceNormAct1d(_BatchInstanceNormAct):
    __doc__ = _DOC.format(d=1, shape="(N, C, L)")
    _dimensions = (3,)


class BatchInstanceNormAct2d(_BatchInstanceNormAct):
    __doc__ = _DOC.format(d=2, shape="(N, C, H, W)")
    _dimensions = (4,)


class BatchInstanceNormAct3d(_BatchInstanceNormAct):
    __doc__ = _DOC.format(d=3, shape="(N, C, D, H, W)")
    _dimensions = (5,)
