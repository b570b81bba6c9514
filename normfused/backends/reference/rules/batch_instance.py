"""Batch-instance norm: y = weight*(gate*(x - mean_c)*rstd_c + (1 - gate)*(x - mean_nc)*rstd_nc) + bias, of the batch and of the sample.

coefficients, about the sample's own mean (``mean`` and ``rstd`` of the interface hold the batch's, then those of every sample):

    centre = mean_nc      scale = weight*(gate*rstd_c + (1 - gate)*rstd_nc)      shift = bias + weight*gate*rstd_c*(mean_nc - mean_c)

vjp, with the sums of dz and of dz*(x - mean_nc) over the positions, delta = mean_nc - mean_c, M = N*S and

    T = rstd_c * sum_n (sum_dz_xc + delta*sum_dz)      T_n = rstd_nc*sum_dz_xc      q_c = -weight*gate*rstd_c^2*T/M

    q = q_c - weight*(1 - gate)*rstd_nc^2*T_n/S
    r = q_c*delta - weight*gate*rstd_c*(sum_n sum_dz)/M - weight*(1 - gate)*rstd_nc*sum_dz/S
    dweight = gate*T + (1 - gate)*sum_n T_n      dgate = weight*(T - sum_n T_n)      dbias = sum_n sum_dz

where the batch's statistics are given, its terms of q and r are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....problem import Problem


def statistics(p: Problem, mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, rstd), (1 + N, C), of the moments of every (n, c) and of every channel."""
    return torch.cat([batch_mean.view(1, -1), mean]), (torch.cat([batch_var.view(1, -1), var]) + p.eps).rsqrt()


def coefficients(
    p: Problem, mean: Tensor, rstd: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(centre, scale, shift), (N, C), of z = scale*(x - centre) + shift."""
    share = gate.to(p.accumulate)
    batch = share * rstd[0]
    scale, shift = batch + (1 - share) * rstd[1:], batch * (mean[1:] - mean[0])
    if weight is not None:
        scale, shift = scale * weight.to(p.accumulate), shift * weight.to(p.accumulate)
    return mean[1:], scale, shift if bias is None else shift + bias.to(p.accumulate)


def coefficients_vjp(
    p: Problem, mean: Tensor, rstd: Tensor, gate: Tensor, weight: Tensor | None, sum_dz: Tensor, sum_dz_xc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, r), (N, C), and the gradients of weight, bias and gate, (C,)."""
    share = gate.to(p.accumulate)
    gamma = torch.ones_like(share) if weight is None else weight.to(p.accumulate)
    delta = mean[1:] - mean[0]
    total, of_samples, all_dz = rstd[0] * (sum_dz_xc + delta * sum_dz).sum(0), rstd[1:] * sum_dz_xc, sum_dz.sum(0)
    own = gamma * (1 - share) * rstd[1:] / p.S
    q, r = -own * rstd[1:] * of_samples, -own * sum_dz
    if p.batch_statistics:
        of_batch = -gamma * share * rstd[0] / p.count
        of_square = of_batch * rstd[0] * total
        q, r = q + of_square, r + of_square * delta + of_batch * all_dz
    every = of_samples.sum(0)
    return q, r, share * total + (1 - share) * every, all_dz, gamma * (total - every)
