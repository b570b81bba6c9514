"""Batch norm with fixed statistics and coefficients, all of them buffers (detection and fine-tuning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..activations import ActivationLike
from ..problem import PRE_ACT
from .base import NormActMixin
from .batch_norm import batch_norm_act

_BUFFERS = ("weight", "bias", "running_mean", "running_var")


class _FrozenBatchNormAct(NormActMixin, nn.Module):
    _dimensions: tuple[int, ...] = ()
    _version = 3  # detectron2's: statistics may be missing below 2

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        *,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name in _BUFFERS:
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self._init_act(num_features, act, residual_mode, backend, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, mean 0, variance 1 - eps: the identity."""
        for name, value in zip(_BUFFERS, (1.0, 0.0, 0.0, 1.0 - self.eps), strict=True):
            nn.init.constant_(getattr(self, name), value)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Tensor) and input.dim() not in self._dimensions:
            allowed = " or ".join(f"{d}D" for d in self._dimensions)
            raise checks.ShapeError(f"{type(self).__name__}: expected {allowed} input (got {input.dim()}D input)")
        return batch_norm_act(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps,
            act=self.act, residual=residual, residual_mode=self.residual_mode, backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # of a layer that was not frozen
        version = local_metadata.get("version")
        if version is not None and version < 2:
            for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
                # without weight this is another layer's checkpoint, and what is missing shall be reported
                if prefix + "weight" in state_dict:
                    state_dict.setdefault(prefix + name, torch.full_like(getattr(self, name), value))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments, **options)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + super().extra_repr()


_DOC = r"""Batch norm whose statistics and coefficients are fixed, with a fused activation and residual add.

    .. math:: y = \mathrm{{act}}\big(\gamma_c (x - \mu_c)/\sqrt{{v_c + \epsilon}} + \beta_c \; [+\, r]\big)

    Args:
        num_features: C.
        eps: default 1e-5.
        device, dtype: of the buffers.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: {shape} in and out. State dict: ``weight``, ``bias``, ``running_mean``, ``running_var``, all (C,) and all buffers, the keys of
    detectron2's and torchvision's ``FrozenBatchNorm2d``; that of a batch norm loads too. They start as the identity (variance 1 - eps).

    The same in training and evaluation; differentiable in the input and the residual, which are all the backward needs (of them, what
    the activation's derivative asks for). Raises what `batch_norm_act` raises.

    Reference: Ioffe & Szegedy, *Batch Normalization*, arXiv 1502.03167.
    """


class FrozenBatchNormAct1d(_FrozenBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C) or (N, C, L)")
    _dimensions = (2, 3)


class FrozenBatchNormAct2d(_FrozenBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    _dimensions = (4,)


class FrozenBatchNormAct3d(_FrozenBatchNormAct):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    _dimensions = (5,)
