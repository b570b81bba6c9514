// Batch-instance norm: y = weight*(gate*(x - mean_c)*rstd_c + (1 - gate)*(x - mean_nc)*rstd_nc) + bias, of the batch and of the sample.
//
// coefficients: about the sample's own mean,
//     scale = weight*(gate*rstd_c + (1 - gate)*rstd_nc),   shift = bias + weight*gate*rstd_c*delta,   delta = mean_nc - mean_c
// vjp, with S1, S2 = sums of dz, dz*(x - mean_nc) over the S positions of a sample, T = rstd_c * sum_n (S2 + delta*S1), U = rstd_nc*S2:
//     dx = scale*dz + q*(x - mean_nc) + r
//     q = q_c - weight*(1 - gate)*rstd_nc^2*U/S,            q_c = -weight*gate*rstd_c^2*T/M
//     r = r_c + q_c*delta - weight*(1 - gate)*rstd_nc*S1/S,  r_c = -weight*gate*rstd_c*(sum_n S1)/M
//     dweight = gate*T + (1 - gate)*sum_n U,   dgate = weight*(T - sum_n U),   dbias = sum_n S1
// Where the batch's statistics are given, q_c and r_c are none.
#pragma once

#include "standard.cuh"

namespace normfused {
namespace batch_instance {

template <class A> struct Mixture {
    A scale, shift;  // without weight and bias
};

template <class A> NF_DEVICE Mixture<A> mixture(A gate, A batch_rstd, A rstd, A delta) {
    const A batch = gate * batch_rstd;
    return {fma_(A(1) - gate, rstd, batch), batch * delta};
}

// q_c and r_c
template <class A> NF_DEVICE Vjp<A> vjp_of_batch(A weight, A gate, A batch_rstd, A t, A sum_dz, A per_element) {
    const A factor = -weight * gate * batch_rstd * per_element;
    return {factor * batch_rstd * t, factor * sum_dz};
}

template <class A> NF_DEVICE Vjp<A> vjp(const Vjp<A>& of_batch, A weight, A gate, A rstd, A delta, A u, A sum_dz, A per_position) {
    const A factor = -weight * (A(1) - gate) * rstd * per_position;
    return {fma_(factor * rstd, u, of_batch.q), fma_(factor, sum_dz, fma_(of_batch.q, delta, of_batch.r))};
}

}  // namespace batch_instance
}  // namespace normfused
