"""The CUDA C++ backend: csrc/kernels behind operators of a compiled library, one call per direction.

``NORMFUSED_EMULATE=1`` runs the same kernels on CPU tensors through csrc/emulation (tests). A residual before an activation with two
slopes (relu, leaky_relu, relu6, hardsigmoid, tlu) leaves a bit mask for the backward, returned in the place of h.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...problem import BATCH_INSTANCE, NHWC, POSITION, POST_ACT, PRE_ACT, PRE_NORM, Problem
from .. import by_steps
from . import _load
from ._load import set_spare_processors

__all__ = [
    "apply",
    "grad_apply",
    "grad_moments",
    "mask_bytes",
    "moments",
    "norm_act",
    "norm_act_backward",
    "reads",
    "set_spare_processors",
    "unavailable",
]

Needs = tuple[bool, bool, bool]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"it supports float16, bfloat16, float32 and float64, not {str(dtype).removeprefix('torch.')}"
    library = _load.library()
    if library is not None and library.emulated:
        return None if device_type == "cpu" else f"NORMFUSED_EMULATE=1 emulates it on CPU tensors, got {device_type}"
    reason = _load.reason()
    if reason is not None:
        return reason
    if device_type != "cuda":
        return f"it needs CUDA tensors, got {device_type}"
    return None


def reads(t: Tensor) -> bool:
    """The kernels have one layout for all tensors; what comes in another is copied once."""
    return False


def _operators() -> Any:
    global _ops
    if _ops is None:
        library = _load.library()
        assert library is not None, _load.reason()
        _ops = library.ops
    return _ops


_ops: Any = None


def _code(p: Problem) -> int:
    """`_load.pack_code`, kept with the problem, which is kept between calls."""
    code: int | None = p.__dict__.get("_cuda_code")
    if code is None:
        code = _load.pack_code(p)
        object.__setattr__(p, "_cuda_code", code)
    return code


def mask_bytes(p: Problem) -> int:
    """Size of the bit mask: a byte per 16-byte vector of every contiguous run (csrc/kernels/slab.cuh)."""
    if p.rule == BATCH_INSTANCE:  # the steps that stand in for a single pass have none
        return 0
    vector = 16 // p.dtype.itemsize
    if p.layout == NHWC or p.S == 1:
        return p.N * p.S * -(-p.C // vector)
    # runs that start inside a vector touch one more; position sets take vectors from each run's start
    ragged = p.scope != POSITION and p.S % vector != 0 and p.N * p.C > 1
    return p.N * p.C * ((p.S + 2 * vector - 2) // vector if ragged else -(-p.S // vector))


def norm_act(
    p: Problem,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    act = p.act
    y, mean, rstd, extra = _operators().norm_act(
        x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, num_batches_tracked,
        _code(p), p.groups, p.eps, p.momentum or 0.0, act.p0, act.p1, *(bounds or ()),
    )  # fmt: skip
    if p.rule == BATCH_INSTANCE and rstd.numel() == 0:  # no single pass takes it
        assert rule_weight is not None
        buffers = (running_mean, running_var, num_batches_tracked)
        return by_steps.norm_act(sys.modules[__name__], p, x, residual, weight, bias, act_weight, rule_weight, *buffers)
    return y, mean, rstd, extra if p.residual_mode in (PRE_NORM, PRE_ACT) else None


def norm_act_backward(
    p: Problem,
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    z_source: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    rule_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    act = p.act
    residual, mask = _sources(p, z_source)
    own = p.residual_mode == PRE_ACT and act.name != "identity"
    need_dx, need_dresidual, need_parameters = needs
    dx, dresidual, dweight, dbias, dact_weight, drule_weight = _operators().norm_act_backward(
        dy, dh, x, residual, mask, weight, bias, act_weight, rule_weight, mean, rstd,
        _code(p), p.groups, p.eps, act.p0, act.p1, need_dx | (need_dresidual and own) << 1 | need_parameters << 2,
    )  # fmt: skip
    if p.rule == BATCH_INSTANCE and not any(t.numel() for t in (dx, dresidual, dweight, dbias, dact_weight, drule_weight)):
        assert rule_weight is not None
        return by_steps.norm_act_backward(
            sys.modules[__name__], p, dy, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, needs
        )
    return (
        dx if need_dx else None,
        _residual_gradient(p, dy, dresidual, need_dresidual) if p.residual_mode else None,
        dweight if need_parameters and weight is not None else None,
        dbias if need_parameters and bias is not None else None,
        dact_weight if need_parameters and act_weight is not None else None,
        drule_weight if need_parameters and rule_weight is not None else None,
    )


def _sources(p: Problem, z_source: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(residual, mask): whichever of the two z is known from."""
    if z_source is None or p.residual_mode != PRE_ACT:
        return None, None
    return (None, z_source) if z_source.dtype == torch.uint8 else (z_source, None)


def _residual_gradient(p: Problem, dy: Tensor, dz: Tensor, needed: bool) -> Tensor | None:
    if not needed or p.residual_mode not in (PRE_ACT, POST_ACT):
        return None
    return dz if p.residual_mode == PRE_ACT and p.act.name != "identity" else dy


# ------------------------------------------------------------------------------ the steps, one set per (n, c)
def moments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _operators().moments(x, _code(p))
    return mean, var


def apply(
    p: Problem, x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, shift_after: Tensor | None = None, need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    y, shifted = _operators().apply(
        x, residual, scale, shift, act_weight, residual_scale, shift_after, _code(p), p.act.p0, p.act.p1, need_y
    )
    return y if need_y else None, None if shift_after is None else shifted


def grad_moments(
    p: Problem, dy: Tensor, x: Tensor, z_source: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, act_weight: Tensor | None,
    residual_scale: Tensor | None = None, dshifted: Tensor | None = None, against: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    residual = z_source if p.residual_mode == PRE_ACT else None
    sum_dz, sum_dz_xc, dact_weight = _operators().grad_moments(
        dy, x, residual, mean, scale, shift, act_weight, residual_scale, dshifted, against, _code(p), p.act.p0, p.act.p1
    )
    return sum_dz, sum_dz_xc, dact_weight if act_weight is not None else None


def grad_apply(
    p: Problem,
    dy: Tensor,
    x: Tensor,
    z_source: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    act_weight: Tensor | None,
    dz_scale: Tensor,
    q: Tensor,
    r: Tensor,
    needs: Needs,
    residual_scale: Tensor | None = None,
    dshifted: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    residual = z_source if p.residual_mode == PRE_ACT else None
    own = p.residual_mode == PRE_ACT and (p.act.name != "identity" or residual_scale is not None or dshifted is not None)
    dx, dresidual = _operators().grad_apply(
        dy, x, residual, mean, scale, shift, act_weight, dz_scale, q, r, residual_scale, dshifted,
        _code(p), p.act.p0, p.act.p1, _load.pack_needs(needs[0], needs[1] and own, False),
    )  # fmt: skip
    return dx if needs[0] else None, (dresidual if own and needs[1] else _residual_gradient(p, dy, dresidual, needs[1]))
