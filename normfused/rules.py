"""What is made of the moments of every (n, c) by norms that pool or mix them, as autograd differentiates it; norms and backends share it.

A rule returns (scale, offset) of shape (N, C), so that z = scale*(x - mean) + offset.
"""

from __future__ import annotations

from torch import Tensor


def pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over dimension ``dim`` of (N, C) moments of equally many elements, kept as a dimension of size 1.

    The spread of the means is added, not a difference of second moments, which would lose everything at a large mean.
    """
    centre = mean.mean(dim, keepdim=True)
    return centre, var.mean(dim, keepdim=True) + (mean - centre).square().mean(dim, keepdim=True)


def batch_instance(
    mean: Tensor,
    var: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None = None,
    batch_rstd: Tensor | None = None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Batch-instance norm, whose instance's branch is zero at the mean; without given statistics those of the batch are taken."""
    if batch_mean is None or batch_rstd is None:
        batch_mean, batch_var = pooled(mean, var, 0)
        batch_rstd = (batch_var + eps).rsqrt()
    batch = gate * batch_rstd
    scale, offset = batch + (1 - gate) * (var + eps).rsqrt(), batch * (mean - batch_mean)
    if weight is not None:
        scale, offset = scale * weight, offset * weight
    return scale, offset if bias is None else offset + bias
