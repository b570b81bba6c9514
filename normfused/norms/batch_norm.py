"""Batch normalization: one set per channel, over samples and positions (scope channel, rule standard)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import CHANNEL, PRE_ACT, STANDARD
from .base import NormActMixin, call, own
from .tracked import need_counter


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
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
    memory_efficient: bool = False,
) -> Tensor:
    r"""Batch norm, activation and residual add in one operation.

    .. math:: y = \mathrm{act}\big(\gamma_c (x - \mu_c)/\sqrt{v_c + \epsilon} + \beta_c \; [+\, r]\big)

    In training :math:`\mu_c, v_c` are the mean and biased variance over (n, s) and the running statistics are updated in
    place, ``running <- (1 - momentum)*running + momentum*value`` with the unbiased variance; otherwise they are the running
    statistics. Sums and coefficients are float32 (float64 for float64).

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format.
        running_mean, running_var: (C,), x's type or float32; both or neither; needed if not training.
        weight, bias: (C,), x's type or float32; None for 1 and 0.
        training: use and track the batch's statistics (default False).
        momentum: weight of the new value (default 0.1); None averages over all batches and needs ``num_batches_tracked``.
        eps: added to the variance (default 1e-5), > 0 in training.
        act: None, a name, ``(name, parameters)``, a torch module, or any callable, which is composed after the norm.
        act_param: PReLU's weight or TLU's threshold, 1 or C values, if ``act`` is a name.
        residual: same shape and type as x.
        residual_mode: ``"pre_act"`` (default) adds it before the activation, ``"post_act"`` after.
        num_batches_tracked: int64 scalar, incremented in training; read on its device.
        backend: overrides the selected backend for this call.
        memory_efficient: keep y, not x, for the backward and rebuild x from it (default False): identity, leaky_relu and softplus only,
            no residual before y, no double backward; weights must not be near 0. See `normfused.rebuild` and docs/memory.md.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: one value per channel in training, eps, unknown names. ShapeError, DeviceError (ValueError and
            RuntimeError): tensors that do not fit. DTypeError (TypeError and NotImplementedError): types that do not fit.
            RuntimeError: the backend asked for cannot run. Nothing is changed by a call that raises.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic; scope channel, rule standard.

    Reference: Ioffe & Szegedy, *Batch Normalization*, arXiv 1502.03167.
    """
    op = "batch_norm_act"
    checks.floating(op, x)
    if x.dim() == 1 and x.numel() == 0:  # torch takes an empty vector for an empty batch
        return x.clone()
    check_batch_norm(op, x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if training:
        checks.more_than_one_value(op, x)
    y: Tensor = call(
        op, x, weight, bias, CHANNEL, STANDARD, 1, eps, act, act_param, residual, residual_mode, backend,
        running_mean=running_mean, running_var=running_var, counter=num_batches_tracked if training else None,
        batch_statistics=training, momentum=momentum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return y


def check_batch_norm(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    counter: Tensor | None,
) -> None:
    """What holds of one process and of many; how many values there must be is for the caller to say."""
    checks.min_dim(op, x, 2)
    channels = x.shape[1]
    checks.eps(op, eps, positive=training)
    if weight is not None:
        checks.parameter(op, "weight", weight, x, channels)
    if bias is not None:
        checks.parameter(op, "bias", bias, x, channels)
    checks.statistics(op, running_mean, running_var, needed="" if training else "when training=False")
    if running_mean is not None:
        checks.statistic(op, "running_mean", running_mean, x, channels)
        checks.statistic(op, "running_var", running_var, x, channels)
        if training:
            need_counter(op, momentum, counter)


class _BatchNormAct(NormActMixin, nn.modules.batchnorm._BatchNorm):
    """Shared by the three; the dimension check is torch's."""

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
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._init_act(num_features, act, residual_mode, backend, device, dtype, bias=bias, memory_efficient=memory_efficient)

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None, bool]:
        """(running mean, running var, counter, momentum, whether the batch's statistics are used) of this call."""
        running_mean, running_var = self._buffers["running_mean"], self._buffers["running_var"]
        batch_statistics = self.training or (running_mean is None and running_var is None)
        counter, momentum = None, self.momentum
        if self.training:
            if self.track_running_stats:
                counter = self._buffers["num_batches_tracked"]
            else:
                running_mean = running_var = None
            if momentum is None and counter is None:
                momentum = 0.0  # as torch: nothing to average over
        elif batch_statistics:
            running_mean = running_var = None
        return running_mean, running_var, counter, momentum, batch_statistics

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        running_mean, running_var, counter, momentum, batch_statistics = self._statistics()
        weight, bias = own(self, "weight"), own(self, "bias")
        return batch_norm_act(
            input, running_mean, running_var, weight, bias, batch_statistics, momentum, self.eps,
            act=self.act, residual=residual, residual_mode=self.residual_mode, num_batches_tracked=counter, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, bias),
        )  # fmt: skip


_DOC = r"""`torch.nn.BatchNorm{d}d` with a fused activation and residual add; see `batch_norm_act` for formula, types and errors.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as `torch.nn.BatchNorm{d}d`.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        memory_efficient: as in `batch_norm_act`; the first training forward raises where a weight is too near 0.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: {shape} in and out. State dict: torch's names and shapes, interchangeable both ways; ``act`` adds its own, if any.

    Reference: Ioffe & Szegedy, *Batch Normalization*, arXiv 1502.03167.
    """


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    __doc__ = _DOC.format(d=1, shape="(N, C) or (N, C, L)")


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    __doc__ = _DOC.format(d=2, shape="(N, C, H, W)")


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    __doc__ = _DOC.format(d=3, shape="(N, C, D, H, W)")
