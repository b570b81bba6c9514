"""EvalNorm: batch norm whose evaluation estimates the statistics of the batch a sample would have been trained in."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import CHANNEL, PRE_ACT, STANDARD
from ..rules import pooled
from .base import call, own
from .batch_norm import _BatchNormAct, batch_norm_act
from .custom import run_rule
from .tracked import (
    batch_norm_options,
    copy_parameters,
    frozen_copy,
    known_to_be,
    momentum_factor,
    need_counter,
    per_channel,
    positions,
    track,
)

Share = float | Tensor


def eval_norm_rule(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(scale, value at the slice's mean)."""
    apart = mean - running_mean
    estimate = beta * var + (1 - beta) * running_var + beta * (1 - beta) * apart.square()
    scale = (estimate + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset = scale * (1 - alpha) * apart
    return scale, offset if bias is None else offset + bias


def _batch_rule(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """Batch norm's (scale, value at the slice's mean), where the moments of every (n, c) are wanted besides."""
    batch_mean, batch_var = pooled(mean, var, 0)
    scale = (batch_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset = scale * (mean - batch_mean)
    return scale, offset if bias is None else offset + bias


def eval_norm_act(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    alpha: Share,
    beta: Share,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
) -> Tensor:
    r"""EvalNorm's evaluation, activation and residual add (its training is `batch_norm_act`).

    .. math:: y = \mathrm{act}\big(\gamma_c (x - \hat\mu_{nc})/\sqrt{\hat v_{nc} + \epsilon} + \beta_c \; [+\, r]\big),\quad
              \hat\mu = \mu + \alpha\delta,\quad \hat v = \beta v_{nc} + (1 - \beta) v + \beta(1 - \beta)\delta^2,\quad
              \delta = \mu_{nc} - \mu

    with the running :math:`\mu_c, v_c` and the sample's own :math:`\mu_{nc}, v_{nc}`.

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format.
        running_mean, running_var: (C,), x's type or float32.
        weight, bias: (C,), x's type or float32; None for 1 and 0.
        eps: default 1e-5, >= 0.
        alpha, beta: shares of the sample's own mean and variance, in [0, 1], numbers or scalar tensors; 1/batch size is the least-squares
            optimum for independent samples; 0 is batch norm in evaluation (on the CPU then one pass), 1 instance norm.
        act, act_param, residual, residual_mode, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, bias, act_param, twice (alpha and beta are constants); deterministic.

    Reference: Singh & Shrivastava, *EvalNorm: Estimating Batch Normalization Statistics for Evaluation*, arXiv 1904.06031.
    """
    op = "eval_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.eps(op, eps)
    checks.statistics(op, running_mean, running_var, needed="in evaluation")
    per_channel(op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    mean, var = frozen_copy(running_mean, x), frozen_copy(running_var, x)
    shares = {name: _share(op, name, value, x) for name, value in (("alpha", alpha), ("beta", beta))}
    if known_to_be(0.0, *shares.values()):
        y: Tensor = call(
            op, x, weight, bias, CHANNEL, STANDARD, 1, eps, act, act_param, residual, residual_mode, backend,
            running_mean=mean, running_var=var, batch_statistics=False,
        )  # fmt: skip
        return y
    parameters = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias, **shares}
    rule = partial(eval_norm_rule, eps=eps)
    y, _, _ = run_rule(op, x, rule, parameters, act, act_param, residual, residual_mode, backend, centred=True)
    return y


def _share(op: str, name: str, value: Share, x: Tensor) -> Tensor:
    """A scalar tensor of its own in the type of x's moments."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise checks.ShapeError(f"{op}: {name} must be a number or a scalar tensor, got shape {tuple(value.shape)}")
        return frozen_copy(value, x).reshape(())
    _check_share(op, name, value)
    return torch.full((), value, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def _check_share(op: str, name: str, value: float) -> None:
    checks.number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must lie in [0, 1], got {value}")


class _EvalNorm(_BatchNormAct):
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        batch_size: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        estimate: bool = False,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
        for what, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                _check_share(name, what, value)
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype, bias=bias, act=act, residual_mode=residual_mode, backend=backend
        )
        default = 0.0 if batch_size is None else 1 / batch_size
        self._initial_shares = (default if alpha is None else alpha, default if beta is None else beta)
        # which of the two the training sets: all that was not given
        self._recorded = (batch_size is None and alpha is None, batch_size is None and beta is None)
        self.estimate = estimate
        for what in ("alpha", "beta", *(("alpha_products", "alpha_squares") if estimate else ())):
            self.register_buffer(what, torch.zeros((), device=device, dtype=dtype))
        self.reset_running_stats()

    @classmethod
    def from_batch_norm(cls, bn: nn.Module, **options: Any) -> Any:
        """A layer with the parameters, statistics, counter, mode and type of ``bn``.

        Args:
            bn: a batch norm layer of torch or of this library, whose activation is taken over.
            options: of the constructor; a trained network wants ``batch_size=`` the one it was trained with, per device.

        Raises:
            TypeError, ValueError: ``bn`` is no batch norm, or keeps no running statistics.
        """
        taken: dict[str, Any] = {"momentum": getattr(bn, "momentum", None)}
        layer = cls(**(taken | batch_norm_options(cls, bn, options)))
        copy_parameters(layer, bn)
        with torch.no_grad():
            cast(Tensor, layer.running_var).copy_(cast(Tensor, bn.running_var))
        return layer

    def reset_running_stats(self) -> None:
        """Running statistics 0 and 1, alpha and beta as constructed."""
        super().reset_running_stats()
        if "beta" in self._buffers:  # torch's constructor calls this before
            self.alpha.fill_(self._initial_shares[0])
            self.beta.fill_(self._initial_shares[1])
            if self.estimate:
                self.alpha_products.zero_()  # type: ignore[operator, union-attr]
                self.alpha_squares.zero_()  # type: ignore[operator, union-attr]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        weight, bias = own(self, "weight"), own(self, "bias")
        running_mean, running_var = cast(Tensor, self._buffers["running_mean"]), cast(Tensor, self._buffers["running_var"])
        kw: dict[str, Any] = {"act": self.act, "residual": residual, "residual_mode": self.residual_mode, "backend": self.backend}
        if not self.training:
            return eval_norm_act(input, running_mean, running_var, weight, bias, self.eps, alpha=self.alpha, beta=self.beta, **kw)
        if self.estimate:
            return self._estimating(input, running_mean, running_var, weight, bias, **kw)
        y = batch_norm_act(
            input, running_mean, running_var, weight, bias, True, self.momentum, self.eps,
            num_batches_tracked=self.num_batches_tracked, **kw,
        )  # fmt: skip
        self._record(input)
        return y

    @torch.no_grad()
    def _record(self, x: Tensor) -> None:
        """alpha = beta = 1/(largest batch so far): the last of an epoch may be smaller."""
        if x.numel():
            for share, wanted in zip((self.alpha, self.beta), self._recorded, strict=True):
                if wanted:
                    share.copy_(torch.where(share > 0, share.clamp(max=1 / x.shape[0]), 1 / x.shape[0]))

    def _estimating(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, **kw: Any
    ) -> Tensor:
        """Batch norm whose moments of every (n, c) move alpha and beta, by statistics from before this step."""
        op, counter = "eval_norm_act", cast(Tensor, self.num_batches_tracked)
        checks.floating(op, x)
        checks.eps(op, self.eps, positive=True)
        checks.statistics(op, running_mean, running_var, needed="with estimate=True")
        need_counter(op, self.momentum, counter)
        per_channel(op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
        checks.more_than_one_value(op, x)
        rule = partial(_batch_rule, eps=self.eps)
        parameters = {"weight": weight, "bias": bias}
        residual, mode = kw["residual"], kw["residual_mode"]
        y, mean, var = run_rule(op, x, rule, parameters, kw["act"], None, residual, mode, kw["backend"], centred=True)
        batch_mean = batch_var = None
        if mean is not None and var is not None:
            with torch.no_grad():
                batch_mean, biased = pooled(mean, var, 0)
                self._move_shares(mean, var, batch_mean, biased, running_mean.to(mean.dtype), running_var.to(mean.dtype))
                count = x.shape[0] * positions(x)
                batch_var = biased * (count / (count - 1))
        track(self.momentum, counter, (running_mean, batch_mean), (running_var, batch_var))
        return y

    def _move_shares(self, mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, old_mean: Tensor, old_var: Tensor) -> None:
        apart = mean - old_mean
        counter = self.num_batches_tracked
        factor = momentum_factor(self.momentum, None if counter is None else counter + 1, mean.dtype)

        def move(running: Tensor, value: Tensor) -> Tensor:
            new = torch.lerp(running.to(value.dtype), value, factor)
            running.copy_(new)
            return new

        products = move(self.alpha_products, ((batch_mean - old_mean) * apart).mean())  # type: ignore[arg-type]
        squares = move(self.alpha_squares, apart.square().mean())  # type: ignore[arg-type]
        self.alpha.copy_(torch.where(squares > 0, (products / squares).clamp(0, 1), self.alpha.to(mean.dtype)))
        # SGD on the squared error of the variance; divided by the squared slope, its steps do not depend on the data's scale
        beta = self.beta.to(mean.dtype)
        missed = batch_var - (beta * var + (1 - beta) * old_var + beta * (1 - beta) * apart.square())
        slope = var - old_var + (1 - 2 * beta) * apart.square()
        steepness = slope.square().sum()
        step = torch.where(steepness > 0, (missed * slope).sum() / steepness, torch.zeros_like(steepness))
        self.beta.copy_((beta + factor * step).clamp(0, 1))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Also takes a batch norm's checkpoint, which has no shares."""
        for name in ("alpha", "beta", "alpha_products", "alpha_squares"):
            if name in self._buffers:
                state_dict.setdefault(prefix + name, self._buffers[name])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", estimate=True" if self.estimate else "")


_DOC = r"""`torch.nn.BatchNorm{d}d` in training, EvalNorm in evaluation, with a fused activation and residual add; see `eval_norm_act`.

    Args:
        num_features, eps, momentum, affine, device, dtype, bias: as `torch.nn.BatchNorm{d}d`.
        batch_size: N per device in training; alpha and beta are 1/N. None (default): the largest batch that training meets; 0, that is
            batch norm, until then.
        alpha, beta: shares of the sample's own mean and variance, in [0, 1], if they are to be other than 1/N.
        estimate: learn both from the training batches, without influence on the model's gradients: alpha as a ratio of moving averages,
            beta by SGD on the squared error of the variance, both at the rate ``momentum`` (default False).
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: {shape} in and out. State dict: torch's names and shapes, which may be loaded alone, and the scalars alpha and beta (with
    ``estimate`` also alpha_products and alpha_squares). From a trained batch norm: ``from_batch_norm``.

    Reference: Singh & Shrivastava, *EvalNorm: Estimating Batch Normalization Statistics for Evaluation*, arXiv 1904.06031.
    """


class EvalNorm1d(_EvalNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(d=1, shape="(N, C) or (N, C, L)")


class EvalNorm2d(_EvalNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(d=2, shape="(N, C, H, W)")


class EvalNorm3d(_EvalNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(d=3, shape="(N, C, D, H, W)")
