// Batch Renorm: y = weight*((x - mean)*rstd*r + d) + bias, where sigma = sqrt(var + eps) = 1/rstd and, of the running mean and deviation
// as they were before this step, r = clamp(sigma/running deviation, 1/r_max, r_max), d = clamp((mean - running mean)/running deviation,
// -d_max, d_max), both constants of the backward.
//
// coefficients: with scale = r*rstd that is weight*scale*(x - centre) + bias, centre = mean - d/scale: the standard rule about another
// centre. Where nothing is clamped, centre and 1/scale are the running mean and deviation. So dweight = scale * sum dz*(x - centre).
// vjp, with A = sum of weight*dz, B' = of weight*dz*(x - centre), shift = mean - centre, and B = B' - shift*A as it is about the mean:
//     dx = weight*scale*dz + q*(x - centre) + r,   q = -scale*rstd^2*B/M,   r = -scale*A/M - q*shift
// The sums are about a point |d|/r deviations from the mean (at most r_max*d_max, however large the mean is), and lose a factor of that to
// rounding, as z itself does. With r = 1 and d = 0 every number is the standard rule's.
#pragma once

#include "standard.cuh"

namespace normfused {

template <class A> struct Running {  // statistics before this step
    A mean, deviation;
};

namespace renorm {

enum : int { saved_scale = 0, saved_r = 1, saved_d = 2 };  // per set, in ``rstd``

template <class A> struct Correction {
    A r, d;
};

template <class A> NF_DEVICE A clamp(A v, A lowest, A highest) { return v < lowest ? lowest : v > highest ? highest : v; }  // NaN stays

template <class A> NF_DEVICE Correction<A> correction(A mean, A deviation, const Running<A>& running, A r_max, A d_max) {
    return {clamp(deviation / running.deviation, A(1) / r_max, r_max), clamp((mean - running.mean) / running.deviation, -d_max, d_max)};
}

template <class A> NF_DEVICE A shift(A scale, const Correction<A>& c) { return c.d / scale; }  // mean - centre

template <class A> NF_DEVICE Vjp<A> vjp(A scale, const Correction<A>& c, A sum_dz, A sum_dz_xc, A per_element) {
    const A rstd = scale / c.r, offset = shift(scale, c), about_mean = fma_(-offset, sum_dz, sum_dz_xc);
    const A q = -scale * rstd * rstd * about_mean * per_element;
    return {q, fma_(-q, offset, -scale * sum_dz * per_element)};
}

}  // namespace renorm
}  // namespace normfused
