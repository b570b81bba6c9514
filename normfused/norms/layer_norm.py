"""Layer normalization: one set per position, over the channels or the trailing dimensions (scope position, rule standard)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import POSITION, PRE_ACT, STANDARD
from .base import RESIDUAL_MODES_ROWS, NormActMixin, call, upcast


def over_position(
    op: str,
    rule: str,
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dim: int,
    act: ActivationLike,
    act_param: Tensor | None,
    residual: Tensor | None,
    residual_mode: str,
    backend: str | None,
    memory_efficient: bool,
) -> Any:
    """Layer and RMS norm: over trailing dimensions as rows of D elements, or over the channels of (N, C, *)."""
    checks.floating(op, x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise checks.ShapeError(f"{op}: normalized_shape must have at least 1 dimension, got {normalized_shape!r}")
    if dim not in (-1, 1):
        raise ValueError(f"{op}: dim must be -1 (trailing dimensions) or 1 (channels of (N, C, *)), got {dim}")
    over_channels = dim == 1
    if over_channels:
        checks.min_dim(op, x, 2)
        if len(shape) != 1 or x.shape[1] != shape[0]:
            raise checks.ShapeError(f"{op}: with dim=1 normalized_shape must be the number of channels {x.shape[1]}, got {shape}")
    elif tuple(x.shape[x.dim() - len(shape) :]) != shape or x.dim() < len(shape):
        raise checks.ShapeError(
            f"{op}: the input's trailing dimensions must be normalized_shape {shape}, got input of shape {tuple(x.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.parameter(op, name, value, x, shape)
    x, weight, bias, act_param, residual = upcast(x, weight, bias, act_param, residual)  # type: ignore[assignment]
    return call(
        op, x, weight, bias, POSITION, rule, 1, eps, act, act_param, residual, residual_mode, backend,
        modes=RESIDUAL_MODES_ROWS, normalized_shape=None if over_channels else shape, memory_efficient=memory_efficient,
    )  # fmt: skip


def layer_norm_act(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int = -1,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
    memory_efficient: bool = False,
) -> Any:
    r"""Layer norm, activation and residual add in one operation.

    .. math:: y_j = \mathrm{act}\big(\gamma_j (x_j - \mu)/\sqrt{v + \epsilon} + \beta_j \; [+\, r_j]\big)

    Mean and biased variance over the trailing dimensions ``normalized_shape`` (``dim=-1``), or, with ``dim=1``, over the C
    channels at each position of a (N, C, \*) map, without a permute; float32 inside (float64 for float64).

    Args:
        x: any shape that ends in ``normalized_shape``, or (N, C, \*) with ``dim=1``; float16, bfloat16, float32 or float64.
        normalized_shape: int or sequence; with ``dim=1`` the number of channels.
        weight, bias: of shape ``normalized_shape`` or None, x's type or float32.
        eps: default 1e-5. Like torch's function this one does not refuse a negative eps (NaN where the sum is negative); the layer does.
        dim: -1 (default) or 1.
        act, act_param, backend, memory_efficient: as in `batch_norm_act` (an ``act_param`` of D values lies along the normalized elements).
        residual: same shape and type as x.
        residual_mode: ``"pre_act"`` (default), ``"post_act"``, or ``"pre_norm"``: h = x + residual is normalized.

    Returns:
        Tensor like x; with ``"pre_norm"`` the pair (y, h).

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic; scope position, rule standard.

    Reference: Ba, Kiros & Hinton, *Layer Normalization*, arXiv 1607.06450.
    """
    return over_position(
        "layer_norm_act", STANDARD, x, normalized_shape, weight, bias, eps, dim, act, act_param, residual, residual_mode, backend,
        memory_efficient,
    )  # fmt: skip


class LayerNormAct(NormActMixin, nn.LayerNorm):
    r"""`torch.nn.LayerNorm` with a fused activation and residual add; see `layer_norm_act` for formula, types and errors.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as `torch.nn.LayerNorm`, in its order.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        dim: -1 (default) for the trailing dimensions, 1 for the channels of (N, C, \*) maps (ConvNeXt).
        residual_mode: ``"pre_act"`` (default), ``"post_act"`` or ``"pre_norm"``; with the last, ``forward(input, residual)``
            returns (y, input + residual), and (y, input) without a residual.
        memory_efficient: as in `batch_norm_act`, with ``"pre_norm"`` too; the first training forward raises where a weight is too near 0.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: torch's names and shapes, interchangeable both ways.

    Reference: Ba, Kiros & Hinton, *Layer Normalization*, arXiv 1607.06450.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        act: ActivationLike = None,
        dim: int = -1,
        residual_mode: str = PRE_ACT,
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        if dim not in (-1, 1):
            raise ValueError(f"LayerNormAct: dim must be -1 (trailing dimensions) or 1 (channels of (N, C, *)), got {dim}")
        self.dim = dim
        channels = math.prod(self.normalized_shape)
        self._init_act(channels, act, residual_mode, backend, device, dtype, modes=RESIDUAL_MODES_ROWS, memory_efficient=memory_efficient)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        weight, bias = self.weight, self.bias
        return layer_norm_act(
            input, self.normalized_shape, weight, bias, self.eps, dim=self.dim,
            act=self.act, residual=residual, residual_mode=self.residual_mode, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, bias),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (", dim=1" if self.dim == 1 else "")
