"""Mean-only batch normalization, the companion of weight normalization (rule mean_only; where ATen runs, in PyTorch)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import checks, ops
from ..activations import ActivationLike
from ..problem import CHANNEL, MEAN_ONLY, PRE_ACT, STANDARD
from .base import call
from .custom import run_rule
from .tracked import TrackedNormAct, frozen_copy, need_counter, per_channel, track


def mean_only_rule(mean: Tensor, var: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(scale, value at the slice's mean); the variance is not read."""
    offset = mean - mean.mean(0, keepdim=True)
    if scale is not None:
        offset = offset * scale
    return scale, offset if bias is None else offset + bias


def mean_only_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    *,
    scale: Tensor | None = None,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Mean-only batch norm, activation and residual add.

    .. math:: y = \mathrm{act}(s_c x - \mu_c + \beta_c \; [+\, r])

    In training :math:`\mu_c` is the mean of :math:`s_c x` over (n, s), and ``running <- (1 - momentum)*running + momentum*value``;
    otherwise it is the running mean. Nothing is divided.

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format: the output of a weight-normalized layer without bias.
        running_mean: (C,), x's type or float32; needed if not training.
        bias: (C,) or None.
        training: use and track the batch's mean (default False).
        momentum: weight of the new value (default 0.1); None averages over all batches and needs ``num_batches_tracked``.
        scale: (C,), g/||v|| where the layer before ran with v in place of its normalized weight; None (default) for 1.
        act, act_param, residual, residual_mode, num_batches_tracked, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, bias, scale, act_param, twice; deterministic. Evaluation is one pass.

    Reference: Salimans & Kingma, *Weight Normalization*, arXiv 1602.07868.
    """
    op = "mean_only_batch_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    per_channel(op, x, bias=bias, scale=scale, running_mean=running_mean)
    y: Tensor
    if not training:
        if running_mean is None:
            raise checks.ArgumentError(f"{op}: running_mean must be given when training=False, got None")
        shift = -frozen_copy(running_mean, x)
        y = call(
            op, x, scale, shift if bias is None else bias.to(shift.dtype) + shift, CHANNEL, STANDARD, 1, 0.0, act, act_param,
            residual, residual_mode, backend, batch_statistics=False,
        )  # fmt: skip
        return y
    checks.more_than_one_value(op, x)
    if running_mean is not None:
        need_counter(op, momentum, num_batches_tracked)
    if ops.has_kernels(x, backend, CHANNEL, MEAN_ONLY):
        y = call(
            op, x, scale, bias, CHANNEL, MEAN_ONLY, 1, 0.0, act, act_param, residual, residual_mode, backend,
            running_mean=running_mean, counter=num_batches_tracked, momentum=momentum,
        )  # fmt: skip
        return y
    rule, parameters = mean_only_rule, {"scale": scale, "bias": bias}
    y, mean, _ = run_rule(
        op, x, rule, parameters, act, act_param, residual, residual_mode, backend, centred=True, translation=scale is None
    )
    if mean is not None:
        mean = mean.mean(0)
        mean = mean if scale is None else mean * scale.detach().to(mean.dtype)
    track(momentum, num_batches_tracked, (running_mean, mean))
    return y


class _MeanOnlyBatchNormAct(TrackedNormAct):
    _statistics: ClassVar[Mapping[str, float]] = {"running_mean": 0.0}

    running_mean: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_features, None, momentum, False, bias, True, device, dtype, act, residual_mode, backend)
        self.reset_parameters()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(input)
        return mean_only_batch_norm_act(
            input, self.running_mean, self.bias, self.training, self.momentum,
            num_batches_tracked=self.num_batches_tracked, **self._epilogue(residual),
        )  # fmt: skip


def _weight_norm_scale(op: nn.Module) -> Tensor | None:
    """g of weight normalization on ``op.weight``: torch's parametrization, one with its keys, or torch's older hook."""
    if parametrize.is_parametrized(op, "weight"):
        kept = op.parametrizations.weight  # type: ignore[union-attr]
        found: Tensor | None = getattr(kept, "original0", None)
        return found if hasattr(kept, "original1") else None
    older: Tensor | None = getattr(op, "weight_g", None)
    return older


def fold_mean_only_batch_norm(op: nn.Module, norm: nn.Module) -> nn.Module:
    """One layer that evaluates like ``norm(op(x))``: the weight as it is normalized now, and the running mean in the bias.

    Args:
        op: convolution, transposed convolution or linear layer, with or without weight normalization, in evaluation mode.
        norm: the mean-only batch norm after it, in evaluation mode.

    Returns:
        A copy of ``op`` with a plain weight and bias, followed by the norm's activation if it has one (`torch.nn.Sequential`).

    Raises:
        TypeError: ``norm`` is no mean-only batch norm. ValueError: one of the two is in training mode, or the sizes do not fit.
    """
    name = "fold_mean_only_batch_norm"
    if not isinstance(norm, _MeanOnlyBatchNormAct):
        raise TypeError(f"{name}: norm must be a mean-only batch norm, got {type(norm).__name__}")
    if not isinstance(getattr(op, "weight", None), Tensor):
        raise TypeError(f"{name}: op must be a layer with a weight, got {type(op).__name__}")
    if op.training or norm.training:
        raise ValueError(f"{name}: op and norm must be in evaluation mode, got training mode")
    features = getattr(op, "out_channels", getattr(op, "out_features", None))
    if features != norm.num_features:
        raise ValueError(f"{name}: op must have the norm's {norm.num_features} output features, got {features}")
    with torch.no_grad():
        weight: Tensor = op.weight  # type: ignore[assignment]
        wide = torch.promote_types(weight.dtype, torch.float32)
        bias = -norm.running_mean.to(wide)
        for term in (norm.bias, op.bias):
            bias = bias if term is None else bias + term.to(wide)  # type: ignore[operator, union-attr]
        folded = _with_plain_weight(op, weight.clone(), bias.to(weight.dtype))
    return folded if norm.act is None else nn.Sequential(folded, copy.deepcopy(norm.act)).eval()


def _with_plain_weight(op: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of ``op`` that has these as parameters and nothing else.

    Not a deepcopy without its parametrization: a copy shares the class that torch made for it, and to remove it would break ``op``.
    """
    kind: Any = type(op).__bases__[0] if parametrize.is_parametrized(op) else type(op)
    plain: nn.Module = kind.__new__(kind)
    kept = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain.__dict__.update({name: type(value)() if name in kept else value for name, value in op.__dict__.items() if name != "weight"})
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return plain


@torch.no_grad()
def data_dependent_init(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Scales every weight-normalized layer that a mean-only batch norm follows so that its outputs have unit variance on this batch.

    One forward pass in training mode, in whose order the layers are set: g <- g/std with the biased standard deviation per channel
    over samples and positions; what follows sees the scaled outputs. The norms' biases stay (they subtract the mean anyway), running
    statistics move as in any forward, channels without variance are left alone. Afterwards the model is in the mode it was in.

    Args:
        model: with weight normalization by `torch.nn.utils.parametrizations.weight_norm`, a parametrization with its keys, or the older
            `torch.nn.utils.weight_norm`. A norm must be given the output of its layer itself.
        inputs, named: of ``model``'s forward.

    Returns:
        What the forward returned.

    Raises:
        ValueError: no norm was given the output of a weight-normalized layer.

    Reference: Salimans & Kingma, *Weight Normalization*, arXiv 1602.07868, section 3.
    """
    last: list[tuple[Tensor, nn.Module, Tensor]] = []  # (output, layer, g) of the layer that ran last
    scaled = 0

    def remember(module: nn.Module, given: Any, output: Any) -> None:
        g = _weight_norm_scale(module)
        if g is not None and isinstance(output, Tensor):
            last[:] = [(output, module, g)]

    def scale(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal scaled
        if not last or given[0] is not last[0][0]:
            return None
        t, layer, g = last[0]
        std = t.detach().to(torch.promote_types(t.dtype, torch.float32)).std([d for d in range(t.dim()) if d != 1], correction=0)
        std = torch.where(std > 0, std, 1)
        g.div_(std.view(_along_features(layer, g, std)).to(g.dtype))
        scaled += 1
        return (t / std.view(1, -1, *[1] * (t.dim() - 2)).to(t.dtype), *given[1:])

    hooks = [m.register_forward_hook(remember) for m in model.modules() if _weight_norm_scale(m) is not None]
    hooks += [m.register_forward_pre_hook(scale) for m in model.modules() if isinstance(m, _MeanOnlyBatchNormAct)]
    modes = {m: m.training for m in model.modules()}
    try:
        found = model.train()(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes.items():
            m.training = mode
    if not scaled:
        raise ValueError("data_dependent_init: model must have a mean-only batch norm after a weight-normalized layer, got none")
    return found


def _along_features(layer: nn.Module, g: Tensor, std: Tensor) -> list[int]:
    """Shape of std against g, which must have one value per output feature."""
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    shape = [1] * g.dim()
    if dim < g.dim():
        shape[dim] = std.numel()
    if list(g.shape) != shape:
        raise ValueError(
            f"data_dependent_init: weight normalization of {type(layer).__name__} must be over dim={dim}, one g for each of its"
            f" {std.numel()} output features, got g of shape {tuple(g.shape)}"
        )
    return shape


_DOC = r"""Mean-only batch norm over {shape} with a fused activation and residual add; see `mean_only_batch_norm_act` for the formula.

    To follow a layer without bias under weight normalization; `data_dependent_init` sets its scale from a first batch,
    `fold_mean_only_batch_norm` makes both one layer for evaluation.

    Args:
        num_features: C.
        momentum: weight of the new value, default 0.1 (the reference keeps 0.9 of the old one).
        bias: default True.
        device, dtype: of bias and running mean.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: bias 0, running_mean 0 (C,), num_batches_tracked, which a checkpoint may lack.

    Reference: Salimans & Kingma, *Weight Normalization*, arXiv 1602.07868.
    """


class MeanOnlyBatchNormAct1d(_MeanOnlyBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C) or (N, C, L)")
    _dimensions = (2, 3)


class MeanOnlyBatchNormAct2d(_MeanOnlyBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    _dimensions = (4,)


class MeanOnlyBatchNormAct3d(_MeanOnlyBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    _dimensions = (5,)
