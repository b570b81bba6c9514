"""What a call is, in numbers: every decision of the library is a function of a `Problem`.

All norms are seen as (N, C, S): N samples, C channels, S positions. A *set* is the group of elements that share one
mean and one variance; `scope` says which elements those are:

==============  ==================================  ==========================  ================
scope           one set per                         norms                       moments' shape
==============  ==================================  ==========================  ================
channel         channel c, over n and s             batch norm                  (C,)
sample_group    sample n and group g                group, instance norm, FRN   (N, G)
position        sample n and position s, over c     layer, RMS norm             (N, S)
==============  ==================================  ==========================  ================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import IDENTITY, Activation

__all__ = ["Problem", "accumulation_dtype", "dense", "empty_like", "format_of", "layout_of"]

CHANNEL, SAMPLE_GROUP, POSITION = "channel", "sample_group", "position"
STANDARD, RMS, MEAN_ONLY, RENORM, BATCH_INSTANCE = "standard", "rms", "mean_only", "renorm", "batch_instance"  # backends/reference/rules
# the last three of scope channel
NCHW, NHWC = "nchw", "nhwc"
PRE_ACT, POST_ACT, PRE_NORM = "pre_act", "post_act", "pre_norm"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type statistics and coefficients are held in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout_of(x: Tensor) -> str | None:
    """``"nchw"`` if x is contiguous, ``"nhwc"`` if its channels (dim 1) are innermost, None if it is neither."""
    if x.is_contiguous():
        return NCHW
    if x.dim() >= 3 and x.movedim(1, -1).is_contiguous():
        return NHWC
    return None


def format_of(x: Tensor) -> str:
    """The layout of what is made of x, dense or not: ``"nhwc"`` if its channels are innermost in memory, else ``"nchw"``.

    Expanded dimensions (stride 0) do not count: they have no order.
    """
    have = layout_of(x)
    if have is not None:
        return have
    steps = [x.stride(d) for d in range(2, x.dim()) if x.size(d) > 1 and x.stride(d) > 0]
    return NHWC if steps and 0 < x.stride(1) < min(steps) else NCHW


def empty_like(x: Tensor) -> Tensor:
    """What every output of x's size begins as: of x's strides if x is dense, else dense in ``format_of(x)``."""
    if layout_of(x) is not None:
        return torch.empty_like(x)
    if format_of(x) == NHWC:
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense(x: Tensor, layout: str | None = None) -> Tensor:
    """x itself if it is dense in ``layout`` (by default: in either), else a copy that is in it (by default: in ``format_of(x)``)."""
    have = layout_of(x)
    if have is not None and (layout is None or have == layout):
        return x
    if (layout or format_of(x)) == NHWC and x.dim() >= 3:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


@dataclass(frozen=True)
class Problem:
    """Everything static about one call; hashable. N, C, S count elements; ``groups`` is 1 unless scope is sample_group.

    ``layout`` says where channel c of position s of sample n lies: ``nchw`` at (n*C + c)*S + s, ``nhwc`` at (n*S + s)*C + c.
    ``batch_statistics`` is False where the moments are given (running statistics in evaluation).
    """

    scope: str
    rule: str
    N: int
    C: int
    S: int
    groups: int
    layout: str
    dtype: torch.dtype
    device: torch.device
    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_statistics: bool = True
    act: Activation = None  # type: ignore[assignment]  # identity; Dynamo of torch 2.11 cannot trace an object as a default
    residual_mode: str | None = None

    def __post_init__(self) -> None:
        if self.act is None:
            object.__setattr__(self, "act", IDENTITY)

    @property
    def count(self) -> int:
        """Number of elements of one set."""
        if self.scope == CHANNEL:
            return self.N * self.S
        if self.scope == SAMPLE_GROUP:
            return self.C // self.groups * self.S
        return self.C

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Of mean and rstd; of the batch_instance rule the batch's come first, then those of every sample."""
        if self.rule == BATCH_INSTANCE:
            return (1 + self.N, self.C)
        if self.scope == CHANNEL:
            return (self.C,)
        if self.scope == SAMPLE_GROUP:
            return (self.N, self.groups)
        return (self.N, self.S)

    @property
    def rstd_shape(self) -> tuple[int, ...]:
        """What a backward needs beside the mean: a number a set, of the renorm rule three (rules/renorm.py)."""
        return (3, self.C) if self.rule == RENORM else self.moments_shape

    @property
    def centred(self) -> bool:
        """Whether the rule subtracts the mean."""
        return self.rule != RMS

    @property
    def accumulate(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def z_source(self) -> str | None:
        """What the backward needs beside x to know act'(z): None, ``"y"`` or ``"residual"``.

        Without a residual before the activation, z is recomputed from x. With one, y is kept where it determines the
        derivative, else the residual, which is an input and costs no new memory.
        """
        if self.residual_mode != PRE_ACT or self.act.name == "identity":
            return None
        return "y" if self.act.derivative_from_y(self.dtype) else "residual"
