"""Group normalization: one set per sample and group of channels (scope sample_group, rule standard)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import PRE_ACT, SAMPLE_GROUP, STANDARD
from .base import NormActMixin, call, upcast


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Group norm, activation and residual add in one operation, channels_last kept.

    .. math:: y = \mathrm{act}\big(\gamma_c (x - \mu_{ng})/\sqrt{v_{ng} + \epsilon} + \beta_c \; [+\, r]\big)

    Mean and biased variance of each sample and group over C/G channels and all positions; float32 inside (float64 for float64).
    ``num_groups=1`` is the layer norm of convolutional nets, ``num_groups=C`` instance norm.

    Args:
        x: (N, C, \*), at least 2 dimensions, float16, bfloat16, float32 or float64, any memory format.
        num_groups: G, divides C.
        weight, bias: (C,) or None, x's type or float32.
        eps: default 1e-5. Like torch's function this one does not refuse a negative eps (NaN where the sum is negative); the layer does.
        act, act_param, residual, residual_mode, backend, memory_efficient: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: one value per set in a single set, unknown names; ShapeError: C not divisible by G, shapes;
            DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic; scope sample_group, rule standard.

    Reference: Wu & He, *Group Normalization*, arXiv 1803.08494.
    """
    op = "group_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    channels = x.shape[1]
    if num_groups <= 0 or channels % num_groups:
        raise checks.ShapeError(f"{op}: num_groups must divide the number of channels, got num_groups={num_groups} and C={channels}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.parameter(op, name, value, x, channels)
    if x.numel() == num_groups and x.numel():  # N * (C/G) * S == 1
        raise ValueError(
            f"{op}: Expected more than 1 value per channel when training, got input size {tuple(x.shape)} with num_groups={num_groups}"
        )
    x, weight, bias, act_param, residual = upcast(x, weight, bias, act_param, residual)  # type: ignore[assignment]
    y: Tensor = call(
        op, x, weight, bias, SAMPLE_GROUP, STANDARD, num_groups, eps, act, act_param, residual, residual_mode, backend,
        memory_efficient=memory_efficient,
    )  # fmt: skip
    return y


class GroupNormAct(NormActMixin, nn.GroupNorm):
    r"""`torch.nn.GroupNorm` with a fused activation and residual add; see `group_norm_act` for formula, types and errors.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as `torch.nn.GroupNorm`, in its order.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        memory_efficient: as in `batch_norm_act`; the first training forward raises where a weight is too near 0.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: (N, C, \*) in and out. State dict: torch's names and shapes, interchangeable both ways.

    Reference: Wu & He, *Group Normalization*, arXiv 1803.08494.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        if num_groups <= 0 or num_channels % num_groups:
            raise ValueError(f"GroupNormAct: num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._init_act(num_channels, act, residual_mode, backend, device, dtype, bias=bias, memory_efficient=memory_efficient)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        return group_norm_act(
            input, self.num_groups, weight, bias, self.eps,
            act=self.act, residual=residual, residual_mode=self.residual_mode, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, bias),
        )  # fmt: skip
