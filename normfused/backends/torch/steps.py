"""The three steps on ATen's kernels, one set per (n, c), in float32 or float64.

ATen's batch-norm statistics kernel reads x (1, N*C, S) or one channels_last sample at a time and takes centred sums; its
backward reduction gives sum_dz and sum_dz_xc in one pass. Coefficients are (N, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import grad_activate_from_y
from ...problem import NHWC, POST_ACT, PRE_ACT, Problem, empty_like
from .activation import activate_, grad_activate_

# ATen's sums over the positions of a channels_last sample go one by one, and in float32 lose digits as these grow (a constant background of
# 32^3 positions: 1e-4 of dbias). Folded to (S/k, k*C) with k*C up to this, they are k times as short, and merged at the end.
_FOLDED_CHANNELS = 4096
# Below this many elements a sample, one call a sample costs more than a temporary tensor (measured on 2 cores)
_ELEMENTS_FOR_OWN_CALL = 32768


def _slices(p: Problem, x: Tensor) -> Tensor:
    """(1, N*C, S) of a tensor dense in nchw."""
    return x.reshape(1, p.N * p.C, p.S)


def _pixels(p: Problem, x: Tensor) -> Tensor:
    """(N, S, C) of a tensor dense in nhwc."""
    return x.movedim(1, -1).reshape(p.N, p.S, p.C)


def _sample_by_sample(p: Problem, x: Tensor) -> bool:
    return x.device.type == "cpu" and p.C * p.S >= _ELEMENTS_FOR_OWN_CALL and x.dim() in (4, 5)


def _folds(p: Problem) -> int:
    """Of a channels_last sample: the most neighbouring positions that can stand as channels, with at least 64 left to sum over."""
    most = max(min(_FOLDED_CHANNELS // p.C, p.S // 64), 1)
    return next(k for k in range(most, 0, -1) if p.S % k == 0)


def _folded(p: Problem, sample: Tensor, folds: int) -> Tensor:
    """(1, C, ...) dense in nhwc as (1, folds*C, S/folds, 1)."""
    return sample.movedim(1, -1).reshape(1, p.S // folds, 1, folds * p.C).movedim(-1, 1)


def _moments_of_sample(p: Problem, sample: Tensor) -> tuple[Tensor, Tensor]:
    folds = _folds(p)
    mean, var = (t.view(folds, p.C) for t in torch.batch_norm_update_stats(_folded(p, sample, folds), None, None, 0.0))
    whole = mean.mean(0)
    return whole, var.add_((mean - whole).square_()).mean(0)


def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (N, C)."""
    if p.S == 1:
        return x.reshape(p.N, p.C).clone(), x.new_zeros(p.N, p.C)
    if p.layout == NHWC:
        if _sample_by_sample(p, x):
            pairs = [_moments_of_sample(p, x[n : n + 1]) for n in range(p.N)]
            return torch.stack([mean for mean, _ in pairs]), torch.stack([var for _, var in pairs])
        pixels = _pixels(p, x)
        mean = pixels.mean(1)
        return mean, (pixels - mean.unsqueeze(1)).square_().mean(1)
    if x.device.type == "cpu":
        mean, var = torch.batch_norm_update_stats(_slices(p, x), None, None, 0.0)
    else:
        var, mean = torch.var_mean(_slices(p, x), (0, 2), correction=0)
    return mean.view(p.N, p.C), var.view(p.N, p.C)


def mean_square(p: Problem, x: Tensor) -> Tensor:
    """Mean of x^2, (N, C)."""
    if p.layout == NHWC:
        return _pixels(p, x).square().mean(1)
    norm: Tensor = torch.linalg.vector_norm(x.reshape(p.N, p.C, p.S), dim=2)
    return norm.square_() / p.S


def over_positions(p: Problem, coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.view(p.N, p.C, *[1] * (x.dim() - 2))


def pre_activation(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, residual_scale: Tensor | None = None
) -> Tensor:
    """z in new memory of x's layout."""
    z: Tensor = torch.addcmul(over_positions(p, shift, x), x, over_positions(p, scale, x), out=empty_like(x))
    if p.residual_mode == PRE_ACT and residual is not None:
        z += residual if residual_scale is None else residual * residual_scale
    return z


def apply(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = activate_(pre_activation(p, x, residual, scale, shift, residual_scale), p.act, act_weight)
    if p.residual_mode == POST_ACT:
        assert residual is not None
        y += residual
    return y


def activation_gradient(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dz, gradient of act_weight); without ``z_source`` x alone tells z."""
    if p.act.name == "identity":
        return dy, None
    if p.z_source == "y" and z_source is not None:
        return grad_activate_from_y(dy, z_source, p.act), None
    dz, dweight = grad_activate_(dy, pre_activation(p, x, z_source, scale, shift, residual_scale), p.act, act_weight)
    if dweight is None or act_weight is None:
        return dz, None
    dims = [d for d in range(x.dim()) if d != 1]
    summed = dweight.sum(dims) if act_weight.numel() > 1 else dweight.sum()
    return dz, summed.reshape(act_weight.shape).to(act_weight.dtype)


def grad_moments(p: Problem, dz: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_dz, sum_dz_xc), (N, C), centred at ``centre`` (N, C)."""
    if x.device.type == "cpu" and p.layout != NHWC:
        return _reduce(_slices(p, dz), _slices(p, x), centre.reshape(-1), p.C)
    if p.layout == NHWC and _sample_by_sample(p, x):
        folds = _folds(p)
        pairs = [
            _reduce(_folded(p, dz[n : n + 1], folds), _folded(p, x[n : n + 1], folds), centre[n].repeat(folds), folds * p.C)
            for n in range(p.N)
        ]
        sum_dz, sum_dz_xc = (torch.stack([pair[i].view(folds, p.C).sum(0) for pair in pairs]) for i in range(2))
        return sum_dz, sum_dz_xc
    dims = list(range(2, x.dim()))
    if not dims:
        return dz, dz * (x - centre)
    return dz.sum(dims), (x - over_positions(p, centre, x)).mul_(dz).sum(dims)


def _reduce(dz: Tensor, x: Tensor, centre: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    ones = torch.ones_like(centre)
    _, sum_dz_xc, sum_dz = torch.ops.aten.native_batch_norm_backward(dz, x, ones, None, None, centre, ones, True, 0.0, [False, True, True])
    return sum_dz.view(-1, columns), sum_dz_xc.view(-1, columns)


def grad_apply(p: Problem, dz: Tensor, x: Tensor, centre: Tensor | None, dz_scale: Tensor, q: Tensor | None, r: Tensor | None) -> Tensor:
    """dx = dz_scale*dz + q*(x - centre) + r; without q it is the first term alone."""
    scaled = over_positions(p, dz_scale, x)
    if q is None:
        return torch.mul(dz, scaled, out=empty_like(x))
    if r is None:
        dx = torch.mul(x, over_positions(p, q, x), out=empty_like(x))
    else:
        offset = r if centre is None else torch.addcmul(r, q, centre, value=-1)
        dx = torch.addcmul(over_positions(p, offset, x), x, over_positions(p, q, x), out=empty_like(x))
    return dx.addcmul_(dz, scaled)
