"""Root-mean-square normalization: layer norm without mean and bias (scope position, rule rms)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ActivationLike
from ..problem import PRE_ACT, RMS
from .base import RESIDUAL_MODES_ROWS, NormActMixin
from .layer_norm import over_position


def rms_norm_act(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int = -1,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
    memory_efficient: bool = False,
) -> Any:
    r"""RMS norm, activation and residual add in one operation.

    .. math:: y_j = \mathrm{act}\big(\gamma_j x_j/\sqrt{\overline{x^2} + \epsilon} \; [+\, r_j]\big)

    The mean square is taken over the trailing dimensions (``dim=-1``) or, with ``dim=1``, over the C channels at each position
    of a (N, C, \*) map; float32 inside (float64 for float64).

    Args:
        x, normalized_shape, weight, dim, act, act_param, residual, residual_mode, backend, memory_efficient: as in `layer_norm_act`.
        eps: None (default) is the machine epsilon of float32 (of float64 for float64), as in torch.
            Negative values as in `layer_norm_act`.

    Returns:
        Tensor like x; with ``residual_mode="pre_norm"`` the pair (y, h).

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, act_param, twice; deterministic; scope position, rule rms.

    Reference: Zhang & Sennrich, *Root Mean Square Layer Normalization*, arXiv 1910.07467.
    """
    if eps is None:
        eps = torch.finfo(torch.float64 if isinstance(x, Tensor) and x.dtype == torch.float64 else torch.float32).eps
    return over_position(
        "rms_norm_act", RMS, x, normalized_shape, weight, None, eps, dim, act, act_param, residual, residual_mode, backend,
        memory_efficient,
    )  # fmt: skip


class RMSNormAct(NormActMixin, nn.RMSNorm):
    r"""`torch.nn.RMSNorm` with a fused activation and residual add; see `rms_norm_act` for formula, types and errors.

    Args:
        normalized_shape, eps (default None), elementwise_affine, device, dtype: as `torch.nn.RMSNorm`, in its order.
        act, dim, residual_mode, memory_efficient, backend: as in `LayerNormAct`.

    State dict: torch's names and shapes, interchangeable both ways.

    Reference: Zhang & Sennrich, *Root Mean Square Layer Normalization*, arXiv 1910.07467.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        act: ActivationLike = None,
        dim: int = -1,
        residual_mode: str = PRE_ACT,
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        if dim not in (-1, 1):
            raise ValueError(f"RMSNormAct: dim must be -1 (trailing dimensions) or 1 (channels of (N, C, *)), got {dim}")
        self.dim = dim
        channels = math.prod(self.normalized_shape)
        self._init_act(channels, act, residual_mode, backend, device, dtype, modes=RESIDUAL_MODES_ROWS, memory_efficient=memory_efficient)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        weight = self.weight
        return rms_norm_act(
            input, self.normalized_shape, weight, self.eps, dim=self.dim,
            act=self.act, residual=residual, residual_mode=self.residual_mode, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, None),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (", dim=1" if self.dim == 1 else "")
