"""Switchable normalization: a learned mixture of instance, layer and batch statistics (a rule on the moments of every (n, c))."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import PRE_ACT
from ..rules import pooled
from .custom import run_rule
from .tracked import TrackedNormAct, frozen_copy, momentum_factor, need_counter, per_channel, positions, track

NORMS = ("in", "ln", "bn")


def _unbiased(shape: Sequence[int]) -> tuple[float, float, float]:
    """Factors of the reference implementation's variances: of each (n, c), and of the layer's and the batch's, pooled from these.

    Its layer for (N, C) has no positions; there the layer's and the batch's variances are themselves unbiased.
    """
    if len(shape) == 2:
        n, c = shape
        return 1.0, c / (c - 1) if c > 1 else 1.0, n / (n - 1) if n > 1 else 1.0
    s = 1
    for size in shape[2:]:
        s *= size
    return s / (s - 1) if s > 1 else 1.0, 1.0, 1.0


def _statistics(mean: Tensor, var: Tensor, norm: str, factors: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """(mean, variance) as ``norm`` has them, broadcasting to (N, C)."""
    var = var * factors[0]
    if norm == "in":
        return mean, var
    centre, spread = pooled(mean, var, 1 if norm == "ln" else 0)
    return centre, spread * factors[NORMS.index(norm)]


def switch_norm_rule(
    mean: Tensor,
    var: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    using: tuple[str, ...],
    factors: tuple[float, float, float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(scale, value at the slice's mean); with running statistics given they are the batch's.

    The means are mixed as distances from the slice's own, so that a common offset of all leaves no trace in the weights' gradients.
    """
    shares, var_shares = mean_weight.softmax(0), var_weight.softmax(0)
    distance, mixed = torch.zeros_like(mean), torch.zeros_like(mean)
    for k, norm in enumerate(using):
        if norm == "bn" and running_mean is not None and running_var is not None:
            centre, spread = running_mean, running_var
        else:
            centre, spread = _statistics(mean, var, norm, factors)
        distance = distance + shares[k] * (mean - centre)
        mixed = mixed + var_shares[k] * spread
    scale = (mixed + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset = scale * distance
    return scale, offset if bias is None else offset + bias


def switch_norm_act(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    using: Sequence[str] = NORMS,
    using_moving_average: bool = True,
    unbiased_instance_var: bool = False,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Switchable norm, activation and residual add.

    .. math:: y = \mathrm{act}\Big(\gamma_c \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k v_k + \epsilon}} + \beta_c \; [+\, r]\Big),
              \quad k \in \{\mathrm{in}, \mathrm{ln}, \mathrm{bn}\}

    w and w' are the softmax of ``mean_weight`` and ``var_weight``; "in" is over the positions of (n, c), "ln" over those of all channels
    of n, "bn" over those of all samples of c. In training the running statistics follow the batch's, with the variance that is used (no
    unbiased one); otherwise they take its place.

    Args:
        x: (N, C, \*), float16, bfloat16, float32 or float64, any memory format; for "in" at least 3 dimensions.
        mean_weight, var_weight: (K,) logits in the order of ``using``, x's type or float32.
        running_mean, running_var: (C,) or None, if "bn" is used; needed if not training.
        weight, bias: (C,), x's type or float32; None for 1 and 0.
        training: use and track the batch's statistics (default False).
        momentum: weight of the new value (default 0.1); the reference's keep-fraction k is 1 - momentum. None averages over all batches
            and needs ``num_batches_tracked``.
        eps: default 1e-5, > 0 in training.
        using: which statistics are mixed, of "in", "ln", "bn" in this order (default all).
        using_moving_average: True (default). False: the running statistics become those of all batches together, each of equal weight
            (the reference's "batch average": frozen parameters, one pass over data, then evaluation); needs ``num_batches_tracked``.
        unbiased_instance_var: the reference implementation's variances, unbiased over the positions and pooled from these (for (N, C):
            unbiased over channels and samples); False (default): biased, as in the paper.
        act, act_param, residual, residual_mode, num_batches_tracked, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: one value per channel in training with "bn", one position with ``unbiased_instance_var``, unknown names in ``using``.
            ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, mean_weight, var_weight, weight, bias, act_param, twice; deterministic.

    Reference: Luo, Ren, Peng, Zhang & Li, *Differentiable Learning-to-Normalize via Switchable Normalization*, arXiv 1806.10779.
    """
    op = "switch_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.eps(op, eps, positive=training)
    using = _known_norms(op, using)
    if "in" in using and x.dim() < 3:
        raise checks.ShapeError(f"{op}: input must have at least 3 dimensions to use 'in', got {x.dim()} (shape {tuple(x.shape)})")
    for name, logits in (("mean_weight", mean_weight), ("var_weight", var_weight)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(logits).__name__}")
        if logits.dim() != 1 or logits.shape[0] != len(using):
            raise checks.ShapeError(f"{op}: {name} must have shape ({len(using)},) to go with {using}, got {tuple(logits.shape)}")
        checks.kind_and_place(op, name, logits, x)
    per_channel(op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if unbiased_instance_var and x.dim() > 2 and positions(x) == 1:
        raise ValueError(f"{op}: Expected more than 1 spatial element with unbiased_instance_var=True, got input size {tuple(x.shape)}")
    checks.statistics(op, running_mean, running_var, needed="when training=False" if "bn" in using and not training else "")
    tracked = "bn" in using and running_mean is not None
    given: dict[str, Tensor | None] = {"running_mean": None, "running_var": None}
    if "bn" in using and training:
        checks.more_than_one_value(op, x)
        if tracked:
            need_counter(op, momentum if using_moving_average else None, num_batches_tracked)
    elif "bn" in using:
        assert running_mean is not None and running_var is not None
        given = {"running_mean": frozen_copy(running_mean, x), "running_var": frozen_copy(running_var, x)}
    factors = _unbiased(x.shape) if unbiased_instance_var else (1.0, 1.0, 1.0)
    parameters = {"mean_weight": mean_weight, "var_weight": var_weight, "weight": weight, "bias": bias, **given}
    rule = partial(switch_norm_rule, using=using, factors=factors, eps=eps)
    y, mean, var = run_rule(op, x, rule, parameters, act, act_param, residual, residual_mode, backend, centred=True)
    if training and tracked:
        batch: tuple[Tensor | None, Tensor | None] = (None, None)
        if mean is not None and var is not None:
            batch = _statistics(mean, var, "bn", factors)
        if using_moving_average:
            track(momentum, num_batches_tracked, (running_mean, batch[0]), (running_var, batch[1]))
        else:
            assert running_mean is not None and running_var is not None
            _average_over_batches(running_mean, running_var, *batch, num_batches_tracked)
    return y


@torch.no_grad()
def _average_over_batches(running_mean: Tensor, running_var: Tensor, mean: Tensor | None, var: Tensor | None, counter: Any) -> None:
    """The mean and variance of all batches so far as one: the variance of the batches' means joins their variances."""
    counter.add_(1)
    if mean is None or var is None:
        return
    share = momentum_factor(None, counter, mean.dtype)
    mean, var = mean.view(-1), var.view(-1)
    before, spread = running_mean.to(mean.dtype), running_var.to(mean.dtype)
    apart = (mean - before).square() * (share * (1 - share))
    running_mean.copy_(torch.lerp(before, mean, share))
    running_var.copy_(torch.lerp(spread, var, share) + apart)


def _known_norms(op: str, using: Sequence[str]) -> tuple[str, ...]:
    wanted = tuple(using)
    if not wanted or wanted != tuple(n for n in NORMS if n in wanted):
        raise ValueError(f"{op}: using must be some of {NORMS} in this order, got {wanted}")
    return wanted


class _SwitchNormAct(TrackedNormAct):
    _default_using: tuple[str, ...] = NORMS

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        using_moving_average: bool = True,
        using_bn: bool = True,
        last_gamma: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        using: Sequence[str] | None = None,
        unbiased_instance_var: bool = False,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        if using is None:
            using = [n for n in self._default_using if using_bn or n != "bn"]
        using = _known_norms(type(self).__name__, using)
        super().__init__(num_features, eps, momentum, True, True, "bn" in using, device, dtype, act, residual_mode, backend)
        self.using = using
        self.using_moving_average = using_moving_average
        self.last_gamma = last_gamma
        self.unbiased_instance_var = unbiased_instance_var
        self.mean_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.empty(len(using), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1 (0 with ``last_gamma``), bias 0, logits 1, running statistics 0 and 1."""
        super().reset_parameters()
        if self.last_gamma and self.weight is not None:
            nn.init.zeros_(self.weight)
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(input)
        return switch_norm_act(
            input, self.mean_weight, self.var_weight, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps, using=self.using, using_moving_average=self.using_moving_average,
            unbiased_instance_var=self.unbiased_instance_var, num_batches_tracked=self.num_batches_tracked, **self._epilogue(residual),
        )  # type: ignore[arg-type]  # fmt: skip

    def _own_repr(self) -> str:
        own = f", using={'+'.join(self.using)}"
        own += "" if self.using_moving_average else ", using_moving_average=False"
        own += ", unbiased_instance_var=True" if self.unbiased_instance_var else ""
        return own


_DOC = r"""Switchable norm over {shape} with a fused activation and residual add; see `switch_norm_act` for formula, types and errors.

    Args:
        num_features: C. eps: default 1e-5.
        momentum: weight of the new value, default 0.1; the reference keeps 0.9 in 2-D (the same) and 0.997 in 1-D and 3-D (0.003 here).
        using_moving_average, using_bn, last_gamma: as the reference implementation's; False for a "batch average" (see
            `switch_norm_act`), False for no batch statistics, True for a weight that begins with 0.
        device, dtype: of parameters and statistics.
        using: which statistics are mixed (default {using}); overrides ``using_bn``.
        unbiased_instance_var: True for the reference implementation's variances; its trained networks need it (default False: the paper's).
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: weight 1, bias 0 (C,), mean_weight 1, var_weight 1 (K,), running_mean 0, running_var 1 (C,), num_batches_tracked. The
    reference's shapes (1, C, 1, 1) and (1, C, 1) are taken too, without a counter.

    Reference: Luo et al., *Differentiable Learning-to-Normalize via Switchable Normalization*, arXiv 1806.10779.
    """


class SwitchNormAct1d(_SwitchNormAct):
    __doc__ = _DOC.format(shape="(N, C) or (N, C, L)", using='("ln", "bn")')
    _dimensions = (2, 3)
    _default_using = ("ln", "bn")


class SwitchNormAct2d(_SwitchNormAct):
    __doc__ = _DOC.format(shape="(N, C, H, W)", using="all")
    _dimensions = (4,)


class SwitchNormAct3d(_SwitchNormAct):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)", using="all")
    _dimensions = (5,)
