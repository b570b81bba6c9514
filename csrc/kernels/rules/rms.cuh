// y = weight*x*rstd + bias, rstd = 1/sqrt(mean square + eps): the standard rule with "mean := 0" and no r.
//
// A set of one element loses everything to cancellation in 1 - rstd^2 x^2 = eps*rstd^2; there dx = weight*rstd^3*eps*dz.
// A learned eps (FRN) is eps + |eps_weight|, with deps_weight = sign(eps_weight) * sum(-1/2 rstd^3 B).
#pragma once

#include "standard.cuh"

namespace normfused {
namespace rms {

template <class A> NF_DEVICE A effective_eps(A eps, A eps_weight) { return eps + abs_(eps_weight); }

template <class A> NF_DEVICE Vjp<A> vjp(A rstd, A sum_dz_x, A per_element) { return {-rstd * rstd * rstd * sum_dz_x * per_element, A(0)}; }
template <class A> NF_DEVICE Vjp<A> vjp_of_one(A rstd, A eps) { return {rstd * rstd * eps, A(0)}; }  // q scales dz

template <class A> NF_DEVICE A eps_gradient(A cubed_sum, A eps_weight) {  // cubed_sum: sum of rstd^3 B
    const A sign = eps_weight > A(0) ? A(1) : eps_weight < A(0) ? A(-1) : A(0);
    return A(-0.5) * sign * cubed_sum;
}

}  // namespace rms
}  // namespace normfused
