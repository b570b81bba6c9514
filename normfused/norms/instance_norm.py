"""Instance normalization: one set per sample and channel, over positions (scope sample_group with G = C, rule standard)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import CHANNEL, PRE_ACT, SAMPLE_GROUP, STANDARD
from .base import NormActMixin, call
from .tracked import need_counter


def instance_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Instance norm, activation and residual add in one operation, channels_last kept.

    .. math:: y = \mathrm{act}\big(\gamma_c (x - \mu_{nc})/\sqrt{v_{nc} + \epsilon} + \beta_c \; [+\, r]\big)

    With ``use_input_stats`` the mean and biased variance are those of each (n, c) over its S positions, and running
    statistics, if given, move by ``momentum`` towards their average over the samples (unbiased variance); without it the
    running statistics are used. Sums and coefficients are float32 (float64 for float64).

    Args:
        x: (N, C, \*), at least 3 dimensions, float16, bfloat16, float32 or float64, any memory format.
        running_mean, running_var, weight, bias: (C,) or None, x's type or float32.
        use_input_stats: default True. momentum: default 0.1; None averages over all calls and needs ``num_batches_tracked``.
        eps: default 1e-5, >= 0.
        act, act_param, residual, residual_mode, num_batches_tracked, backend, memory_efficient: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format. An empty batch returns an empty tensor.

    Raises:
        ValueError: one spatial element with input statistics, eps, unknown names; ShapeError, DTypeError, DeviceError,
            RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic; scope sample_group (G = C), rule standard.

    Reference: Ulyanov, Vedaldi & Lempitsky, *Instance Normalization*, arXiv 1607.08022.
    """
    op = "instance_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 3)
    channels = x.shape[1]
    checks.eps(op, eps)
    if weight is not None:
        checks.parameter(op, "weight", weight, x, channels)
    if bias is not None:
        checks.parameter(op, "bias", bias, x, channels)
    checks.statistics(op, running_mean, running_var, needed="" if use_input_stats else "when use_input_stats=False")
    if running_mean is not None:
        checks.statistic(op, "running_mean", running_mean, x, channels)
        checks.statistic(op, "running_var", running_var, x, channels)
        if use_input_stats:
            need_counter(op, momentum, num_batches_tracked)
    if use_input_stats:
        checks.more_than_one_position(op, x)
    y: Tensor = call(
        op, x, weight, bias, SAMPLE_GROUP if use_input_stats else CHANNEL, STANDARD, channels if use_input_stats else 1,
        eps, act, act_param, residual, residual_mode, backend,
        running_mean=running_mean, running_var=running_var, counter=num_batches_tracked if use_input_stats else None,
        batch_statistics=use_input_stats, momentum=momentum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return y


class _InstanceNormAct(NormActMixin, nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        self._init_act(num_features, act, residual_mode, backend, device, dtype, bias=bias, memory_efficient=memory_efficient)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        channel_dim = input.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        unbatched = channel_dim == 0
        if input.size(channel_dim) != self.num_features:
            if self.affine:
                raise checks.ShapeError(
                    f"{type(self).__name__}: expected input's size at dim={channel_dim} to match num_features ({self.num_features}),"
                    f" but got: {input.size(channel_dim)}"
                )
            warnings.warn(
                f"input's size at dim={channel_dim} does not match num_features ({self.num_features}), which affine=False does not use",
                stacklevel=2,
            )
        use_input_stats = self.training or not self.track_running_stats
        # torch leaves this counter alone; it is needed, and counted, only for the cumulative average
        counter = self.num_batches_tracked if self.momentum is None else None
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        if unbatched:
            input, residual = input.unsqueeze(0), residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        weight, bias = self.weight, self.bias
        y = instance_norm_act(
            input, self.running_mean, self.running_var, weight, bias, use_input_stats, momentum, self.eps,
            act=self.act, residual=residual, residual_mode=self.residual_mode, num_batches_tracked=counter, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, bias),
        )  # fmt: skip
        return y.squeeze(0) if unbatched else y


_DOC = r"""`torch.nn.InstanceNorm{d}d` with a fused activation and residual add; see `instance_norm_act` for formula, types and errors.

    Args:
        num_features, eps, momentum, affine (default False), track_running_stats (default False), device, dtype, bias: as
            `torch.nn.InstanceNorm{d}d`; ``momentum=None`` gives the cumulative average (torch: no update).
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        memory_efficient: as in `batch_norm_act`; the first training forward raises where a weight is too near 0.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: {shape}, or without N, in and out. State dict: torch's names and shapes, interchangeable both ways.

    Reference: Ulyanov, Vedaldi & Lempitsky, *Instance Normalization*, arXiv 1607.08022.
    """


class InstanceNormAct1d(_InstanceNormAct, nn.InstanceNorm1d):
    __doc__ = _DOC.format(d=1, shape="(N, C, L)")


class InstanceNormAct2d(_InstanceNormAct, nn.InstanceNorm2d):
    __doc__ = _DOC.format(d=2, shape="(N, C, H, W)")


class InstanceNormAct3d(_InstanceNormAct, nn.InstanceNorm3d):
    __doc__ = _DOC.format(d=3, shape="(N, C, D, H, W)")
