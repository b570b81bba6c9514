"""Steps 1 to 3, backward, in one launch: dz and x lie in registers between the sums and dx = dz_scale*dz + q*(x - centre) + r.

Tiles as in single_pass. Where a set is a channel its parameters' gradients are written at once; else the sums per (n, c) are,
which `grad_channels_kernel` adds up over n. Reads x, dy [and y or residual] once, writes dx [and dresidual]: 3 (5) elements each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import grad_weight
from .grad_coefficients import coefficients_vjp
from .grad_moments import activation_gradient
from .mask import set_bytes, unpack
from .rules import batch_instance, rms
from .single_pass import at_samples, channels_of, locate_sets, over_columns, over_set, set_offsets, sum_set
from .tiles import divisible, get, put


@triton.jit
def saved_of_samples(mean, rstd, index, inside, C, BR: tl.constexpr):
    """What the batch_instance rule saved: (mean, rstd) of every (set, row)."""
    at = at_samples(index, C, BR)
    return tl.load(mean + at, mask=inside[:, :, None], other=0.0), tl.load(rstd + at, mask=inside[:, :, None], other=0.0)


@triton.jit
def grad_single_pass_kernel(
    x, dy, source, dx, dresidual, mean, rstd, weight, bias, act_weight, rule_weight, out_dz, out_dz_xc, out_act, out_rule,
    D, S, R, so, sg, sR, sS, groups, per_outer, count,
    RULE: tl.constexpr, GIVEN: tl.constexpr, SOURCE: tl.constexpr, GROUP: tl.constexpr, NHWC: tl.constexpr,
    ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACT_PER_CHANNEL: tl.constexpr, ROWS_ARE_CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BSET: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out_*: where a set is a channel dbias, dweight, dact_weight, drule_weight, else the sums of dz, dz*(x - centre), dL/dact_weight."""
    so = divisible(so, ALIGN)
    sg = divisible(sg, ALIGN)
    sR = divisible(sR, ALIGN)
    S = divisible(S, ALIGN)
    j0, j, index, start = locate_sets(per_outer, so, sg, BSET)
    offsets = set_offsets(sg, sR, sS, BSET, BR, BS, WIDE)
    inside = (j < per_outer)[:, None] & (tl.arange(0, BR) < R)[None, :]
    live = inside[:, :, None] & (tl.arange(0, BS) < S)[None, None, :]
    c = channels_of(index, groups, D, BR, ROWS_ARE_CHANNELS)
    known = inside if ROWS_ARE_CHANNELS else (j < per_outer)[:, None]
    deviation = tl.load(rstd + index, mask=j < per_outer, other=0.0)
    centre = tl.zeros([BSET], ACC)
    if mean is not None:
        centre = tl.load(mean + index, mask=j < per_outer, other=0.0)
    gamma = over_columns(weight, c, known, 1.0, ACC)
    shift = over_columns(bias, c, known, 0.0, ACC)
    if RULE == "batch_instance":
        gate = over_columns(rule_weight, c, known, 1.0, ACC)
        sample_mean, sample_rstd = saved_of_samples(mean, rstd, index, inside, groups, BR)
        scale, shift = batch_instance.coefficients(sample_mean - over_set(centre), over_set(deviation), sample_rstd, gate, gamma, shift)
        centred = get(x + start + offsets, live, ACC) - sample_mean
    else:
        scale = over_set(deviation) * gamma
        centred = get(x + start + offsets, live, ACC) - over_set(centre)
    upstream = get(dy + start + offsets, live, ACC)
    z = centred * scale + shift
    aw = over_columns(act_weight, c if ACT_PER_CHANNEL else c * 0, known, 0.0, ACC)
    bit = tl.zeros([1, 1, 1], tl.int1)
    if SOURCE == "mask":
        at, has = set_bytes(j0, per_outer, R, S, sg, sR, sS, NHWC, WIDE, BSET, BR, BS, GROUP)
        bit = tl.reshape(unpack(tl.load(source + start // GROUP + at, mask=has, other=0), 0 if NHWC else 1, GROUP), [BSET, BR, BS])
    dz, z = activation_gradient(upstream, z, source, start + offsets, live, bit, aw, SOURCE, ACT, P0, P1)
    if dresidual is not None:
        put(dresidual + start + offsets, dz, live)
    sum_dz = tl.sum(dz, 2)
    sum_dz_xc = tl.sum(tl.where(live, dz * centred, 0.0), 2)
    if ROWS_ARE_CHANNELS:
        at = index.to(tl.int64)[:, None] * D + tl.arange(0, BR)[None, :]
        if out_dz is not None:
            tl.store(out_dz + at, sum_dz, mask=inside)
            tl.store(out_dz_xc + at, sum_dz_xc, mask=inside)
        if out_act is not None:
            tl.store(out_act + at, tl.sum(grad_weight(upstream, z, aw, ACT, SOURCE), 2), mask=inside)
    else:
        if RULE == "batch_instance":
            tl.debug_barrier()  # so that the compiler reads again what else would hold registers from the first use to this
            sample_mean, sample_rstd = saved_of_samples(mean, rstd, index, inside, groups, BR)
            delta = sample_mean - over_set(centre)
            scale, _ = batch_instance.coefficients(delta, over_set(deviation), sample_rstd, gate, gamma, 0.0)
            q, r, dgamma, dgate = batch_instance.coefficients_vjp(
                delta, over_set(deviation), sample_rstd, gate, gamma, sum_dz[:, :, None], sum_dz_xc[:, :, None], S, count, GIVEN
            )  # fmt: skip
            dweight = sum_set(dgamma)
            if out_rule is not None:
                put(out_rule + index, sum_set(dgate), j < per_outer)
        else:
            dweight = tl.sum(sum_dz_xc, 1) * deviation
        if out_dz is not None:
            put(out_dz + index, tl.sum(sum_dz, 1), j < per_outer)
        if out_dz_xc is not None:
            put(out_dz_xc + index, dweight, j < per_outer)
        if out_act is not None:
            put(out_act + index, sum_set(grad_weight(upstream, z, aw, ACT, SOURCE)), j < per_outer)
    if dx is not None:
        if RULE != "batch_instance":
            flat = tl.sum(gamma, 2)
            b = tl.sum(sum_dz_xc * flat, 1)
            if RULE != "rms":
                a = tl.sum(sum_dz * flat, 1)
                set_q, set_r = coefficients_vjp(rstd, index, j < per_outer, deviation, a, b, groups, count, RULE)
                q, r = over_set(set_q), over_set(set_r)
            else:
                q, r = over_set(rms.coefficients_vjp(deviation, b, count)), 0.0
        put(dx + start + offsets, dz * scale + (q * centred + r), live)
