"""Filter response normalization with its thresholded linear unit (scope sample_group with G = C, rule rms)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..activations import TLU, Activation, ActivationLike
from ..problem import PRE_ACT, RMS, SAMPLE_GROUP
from .base import NormActMixin, call, take_other_shapes

_TLU = Activation("tlu")


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps: float = 1e-6,
    *,
    eps_l: Tensor | None = None,
    act: ActivationLike = None,
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    backend: str | None = None,
) -> Tensor:
    r"""Filter response norm and thresholded linear unit (or any activation) in one operation.

    .. math:: y = \max\big(\gamma_c\, x/\sqrt{\nu^2_{nc} + \epsilon + |\epsilon_l|} + \beta_c,\ \tau_c\big),\quad
              \nu^2_{nc} = \tfrac1S \textstyle\sum_s x^2

    No mean is subtracted and no batch is involved; training and evaluation are the same. A tie with tau counts as the norm's
    output. With S = 1 the gradient is taken from its closed form, which does not cancel.

    Args:
        x: (N, C, \*), at least 2 dimensions, float16, bfloat16, float32 or float64, any memory format.
        weight, bias: (C,) or None, x's type or float32.
        tau: threshold, (C,) or (1,); None for no TLU, then ``act`` may be given.
        eps: default 1e-6 (timm: 1e-5), >= 0.
        eps_l: learned eps, (1,) or (C,) (scope: added as \|eps_l\|); recommended for 1x1 maps. None (default): none.
        act, act_param, residual, residual_mode, backend: as in `batch_norm_act`; ``act`` excludes ``tau``.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in `batch_norm_act`.

    Differentiable in x, residual, weight, bias, tau, eps_l, twice; deterministic; scope sample_group (G = C), rule rms.

    Reference: Singh & Krishnan, *Filter Response Normalization Layer*, arXiv 1911.09737.
    """
    op = "filter_response_norm"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    channels = x.shape[1]
    checks.eps(op, eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.parameter(op, name, value, x, channels)
    if eps_l is not None:
        checks.parameter(op, "eps_l", eps_l, x, 1 if eps_l.numel() == 1 else channels)
    if tau is not None:
        if act is not None:
            raise ValueError(f"{op}: give either tau or act, got both (act={act!r})")
        act, act_param = _TLU, tau
    y: Tensor = call(
        op, x, weight, bias, SAMPLE_GROUP, RMS, channels, eps, act, act_param, residual, residual_mode, backend, rule_weight=eps_l
    )  # fmt: skip
    return y


class _FilterResponseNorm(NormActMixin, nn.Module):
    _dimensions: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        learnable_eps: bool | str = False,
        tlu: bool = True,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if learnable_eps not in (False, True, "scalar", "channel"):
            raise ValueError(f"{name}: learnable_eps must be False, True or 'scalar' (one value), or 'channel', got {learnable_eps!r}")
        self.num_features = num_features
        self.eps = eps
        # an activation given in place of TLU needs no tlu=False beside it
        self.tlu = tlu and act is None
        self.learnable_eps = learnable_eps
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **kind))
        self.bias = nn.Parameter(torch.empty(num_features, **kind))
        self.tau = nn.Parameter(torch.empty(num_features, **kind)) if self.tlu else None
        self.eps_l = nn.Parameter(torch.empty(num_features if learnable_eps == "channel" else 1, **kind)) if learnable_eps else None
        self._init_act(num_features, act, residual_mode, backend, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, tau 0, learned eps 1e-4."""
        super().reset_parameters()
        if self.tau is not None:
            nn.init.zeros_(self.tau)
        if self.eps_l is not None:
            nn.init.constant_(self.eps_l, 1e-4)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        name = type(self).__name__
        if isinstance(input, Tensor) and input.dim() not in self._dimensions:
            allowed = " or ".join(f"{d}D" for d in self._dimensions)
            raise checks.ShapeError(f"{name}: expected {allowed} input (got {input.dim()}D input)")
        if isinstance(input, Tensor):
            checks.channels(name, input, self.num_features)
        return filter_response_norm(
            input, self.weight, self.bias, self.tau, self.eps, eps_l=self.eps_l,
            act=self.act, residual=residual, residual_mode=self.residual_mode, backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_other_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        own = f"{self.num_features}, eps={self.eps}, tlu={self.tlu}"
        own += f", learnable_eps={self.learnable_eps}" if self.learnable_eps else ""
        return own + super().extra_repr()


_DOC = r"""Filter response norm with TLU over {shape}; see `filter_response_norm` for formula, types and errors.

    Args:
        num_features: C.
        eps: default 1e-6, the paper's (timm: 1e-5).
        learnable_eps: False (default), True or ``"scalar"`` for one learned value, ``"channel"`` for C; init 1e-4.
        tlu: learned threshold ``tau`` (default True); off if ``act`` is given.
        act: any activation in place of TLU (default None).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.
        device, dtype: of the parameters.

    State dict: weight 1, bias 0, tau 0, all (C,), timm's names; eps_l (1,) or (C,) if learned. Others' (1, C, 1, 1)
    is taken too.

    Reference: Singh & Krishnan, *Filter Response Normalization Layer*, arXiv 1911.09737.
    """


class FilterResponseNorm1d(_FilterResponseNorm):
    __doc__ = _DOC.format(shape="(N, C) or (N, C, L)")
    _dimensions = (2, 3)


class FilterResponseNorm2d(_FilterResponseNorm):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    _dimensions = (4,)


class FilterResponseNorm3d(_FilterResponseNorm):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    _dimensions = (5,)


__all__ = ["TLU", "FilterResponseNorm1d", "FilterResponseNorm2d", "FilterResponseNorm3d", "filter_response_norm"]
