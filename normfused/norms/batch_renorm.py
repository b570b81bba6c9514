"""Batch Renormalization: batch statistics in training, corrected towards the running ones (rule renorm; where ATen runs, in PyTorch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..activations import ActivationLike
from ..problem import CHANNEL, PRE_ACT, RENORM, STANDARD, accumulation_dtype
from ..rules import pooled
from .base import call
from .custom import run_rule
from .tracked import TrackedNormAct, batch_norm_options, copy_parameters, frozen_copy, need_counter, per_channel, track

Bound = float | Tensor


def batch_renorm_rule(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_std: Tensor,
    *,
    r_max: Bound,
    d_max: Bound,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(scale, value at the slice's mean); r and d are constants of the backward."""
    batch_mean, batch_var = pooled(mean, var, 0)
    std = (batch_var + eps).sqrt()
    highest, farthest = (torch.as_tensor(t, dtype=mean.dtype, device=mean.device) for t in (r_max, d_max))
    r = torch.clamp(std.detach() / running_std, highest.reciprocal(), highest)
    d = torch.clamp((batch_mean.detach() - running_mean) / running_std, -farthest, farthest)
    scale, offset = r / std, d
    if weight is not None:
        scale, offset = scale * weight, offset * weight
    return scale, scale * (mean - batch_mean) + (offset if bias is None else offset + bias)


def _on_device(bound: Bound, x: Tensor) -> Tensor:
    """A bound as the kernels read it: on x's device, where nobody waits for it."""
    wide = accumulation_dtype(x.dtype)
    if isinstance(bound, Tensor):
        return bound.detach().to(x.device, wide)
    return torch.full((), bound, dtype=wide, device=x.device)


def batch_renorm_act(
    x: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    *,
    r_max: Bound = 3.0,
    d_max: Bound = 5.0,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Batch Renorm, activation and residual add.

    .. math:: y = \mathrm{act}\big(\gamma_c (\tfrac{x - \mu_c}{\sigma_c}\, r_c + d_c) + \beta_c \; [+\, r]\big),\quad
              r_c = \mathrm{clip}_{[1/r_{max},\, r_{max}]}(\sigma_c/\sigma),\quad
              d_c = \mathrm{clip}_{[-d_{max},\, d_{max}]}((\mu_c - \mu)/\sigma)

    In training :math:`\mu_c` and :math:`\sigma_c = \sqrt{v_c + \epsilon}` are the batch's, :math:`\mu, \sigma` the running ones before
    this call, r and d constants of the backward; then ``running <- running + momentum*(value - running)`` for mean and standard deviation.
    Otherwise :math:`y = \mathrm{act}(\gamma_c (x - \mu)/\sigma + \beta_c)`, with no further eps.

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format.
        running_mean, running_std: (C,), x's type or float32.
        weight, bias: (C,), x's type or float32; None for 1 and 0.
        training: use and track the batch's statistics (default False).
        momentum: weight of the new value (default 0.01, the paper's); None averages over all batches and needs ``num_batches_tracked``.
        eps: added to the batch's variance inside the root (default 1e-5), > 0 in training.
        r_max, d_max: bounds, >= 1 and >= 0, numbers or scalar tensors (default 3 and 5); with 1 and 0 this is batch norm.
        act, act_param, residual, residual_mode, backend: as in `batch_norm_act`.
        num_batches_tracked: int64 scalar, incremented in training.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`. Nothing is changed by a call that raises.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic. Evaluation is one pass.

    Reference: Ioffe, *Batch Renormalization*, arXiv 1702.03275.
    """
    op = "batch_renorm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.eps(op, eps, positive=training)
    checks.statistics(op, running_mean, running_std, "running_std", needed="in training and evaluation")
    per_channel(op, x, weight=weight, bias=bias, running_mean=running_mean, running_std=running_std)
    for name, bound, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if isinstance(bound, Tensor):
            if bound.numel() != 1:
                raise checks.ShapeError(f"{op}: {name} must be a number or a scalar tensor, got shape {tuple(bound.shape)}")
            continue
        checks.number(op, name, bound, " or a scalar tensor")
        if not bound >= least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {bound}")
    y: Tensor
    if not training:
        mean, std = frozen_copy(running_mean, x), frozen_copy(running_std, x)
        y = call(
            op, x, weight, bias, CHANNEL, STANDARD, 1, 0.0, act, act_param, residual, residual_mode, backend,
            running_mean=mean, running_var=std.square(), batch_statistics=False,
        )  # fmt: skip
        return y
    checks.more_than_one_value(op, x)
    need_counter(op, momentum, num_batches_tracked)
    if ops.has_kernels(x, backend, CHANNEL, RENORM):
        y = call(
            op, x, weight, bias, CHANNEL, RENORM, 1, eps, act, act_param, residual, residual_mode, backend, running_mean=running_mean,
            running_var=running_std, counter=num_batches_tracked, momentum=momentum, bounds=(_on_device(r_max, x), _on_device(d_max, x)),
        )  # fmt: skip
        return y
    mean, std = frozen_copy(running_mean, x), frozen_copy(running_std, x)
    rule = partial(batch_renorm_rule, r_max=r_max, d_max=d_max, eps=eps)
    parameters = {"weight": weight, "bias": bias, "running_mean": mean, "running_std": std}
    y, slice_mean, slice_var = run_rule(op, x, rule, parameters, act, act_param, residual, residual_mode, backend, centred=True)
    batch_mean = batch_std = None
    if slice_mean is not None and slice_var is not None:
        batch_mean, batch_var = pooled(slice_mean, slice_var, 0)
        batch_std = (batch_var + eps).sqrt()
    track(momentum, num_batches_tracked, (running_mean, batch_mean), (running_std, batch_std))
    return y


Schedule = Callable[[Tensor], tuple[Bound, Bound]]


class _BatchRenormAct(TrackedNormAct):
    _statistics: ClassVar[Mapping[str, float]] = {"running_mean": 0.0, "running_std": 1.0}

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5000,
        r_max_step: int = 40000,
        d_max_step: int = 25000,
        schedule: Schedule | None = None,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        if not r_max >= 1 or not d_max >= 0:
            raise ValueError(f"{name}: r_max must be at least 1 and d_max at least 0, got {r_max} and {d_max}")
        if not 0 <= warmup_steps <= min(r_max_step, d_max_step):
            raise ValueError(
                f"{name}: warmup_steps must be between 0 and r_max_step and d_max_step,"
                f" got {warmup_steps} with {r_max_step} and {d_max_step}"
            )
        super().__init__(num_features, eps, momentum, affine, affine and bias, True, device, dtype, act, residual_mode, backend)
        self.r_max, self.d_max = r_max, d_max
        self.warmup_steps, self.r_max_step, self.d_max_step = warmup_steps, r_max_step, d_max_step
        self.schedule = schedule
        self.reset_parameters()

    @classmethod
    def from_batch_norm(cls, bn: nn.Module, **options: Any) -> Any:
        """A layer that evaluates like ``bn``, with all it has learned; running_std is sqrt(running_var + eps).

        Args:
            bn: a batch norm layer of torch or of this library, whose activation is taken over.
            options: of the constructor, e.g. ``warmup_steps=0`` for full correction at once; the counter of ``bn`` goes on counting.

        Raises:
            TypeError, ValueError: ``bn`` is no batch norm, or keeps no running statistics.
        """
        layer = cls(**batch_norm_options(cls, bn, options))
        copy_parameters(layer, bn)
        var: Tensor = bn.running_var  # type: ignore[assignment]
        with torch.no_grad():
            layer.running_std.copy_((var.to(torch.promote_types(var.dtype, torch.float32)) + layer.eps).sqrt())
        return layer

    def bounds(self) -> tuple[Bound, Bound]:
        """(r_max, d_max) of the next step, from the counter on its device: 1 and 0 up to ``warmup_steps``, then linear."""
        counter = self.num_batches_tracked
        assert counter is not None
        counter = ops.snapshot(counter)
        if self.schedule is not None:
            return self.schedule(counter)
        step = counter.to(torch.float32) - self.warmup_steps

        def ramp(last: int) -> Tensor:
            steps = last - self.warmup_steps
            return (step / steps).clamp(0, 1) if steps else (step >= 0).to(torch.float32)

        return 1 + (self.r_max - 1) * ramp(self.r_max_step), self.d_max * ramp(self.d_max_step)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(input)
        r_max, d_max = self.bounds() if self.training else (self.r_max, self.d_max)
        return batch_renorm_act(
            input, self.running_mean, self.running_std, self.weight, self.bias, self.training, self.momentum, self.eps,
            r_max=r_max, d_max=d_max, num_batches_tracked=self.num_batches_tracked, **self._epilogue(residual),
        )  # type: ignore[arg-type]  # fmt: skip

    def _own_repr(self) -> str:
        when = "schedule" if self.schedule is not None else f"{self.warmup_steps}..{self.r_max_step}/{self.d_max_step}"
        return f", r_max={self.r_max}, d_max={self.d_max}, steps={when}"


_DOC = r"""Batch Renorm over {shape} with a fused activation and residual add; see `batch_renorm_act` for formula, types and errors.

    Args:
        num_features, eps, momentum (default 0.01), affine, device, dtype, bias: as `torch.nn.BatchNorm{d}d`.
        r_max, d_max: the bounds in the end, default 3 and 5.
        warmup_steps: steps of plain batch norm (default 5000); then the bounds grow linearly from 1 and 0, until step ``r_max_step``
            (default 40000) and ``d_max_step`` (default 25000), the paper's. All three 0: the full bounds from the first step.
        schedule: in place of these, called with ``num_batches_tracked`` before the step (a tensor); returns (r_max, d_max), numbers or
            tensors.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: weight 1, bias 0, running_mean 0, running_std 1, all (C,), num_batches_tracked. From a batch norm: ``from_batch_norm``.

    Reference: Ioffe, *Batch Renormalization*, arXiv 1702.03275.
    """


class BatchRenormAct1d(_BatchRenormAct):
    __doc__ = _DOC.format(d=1, shape="(N, C) or (N, C, L)")
    _dimensions = (2, 3)


class BatchRenormAct2d(_BatchRenormAct):
    __doc__ = _DOC.format(d=2, shape="(N, C, H, W)")
    _dimensions = (4,)


class BatchRenormAct3d(_BatchRenormAct):
    __doc__ = _DOC.format(d=3, shape="(N, C, D, H, W)")
    _dimensions = (5,)
