// y = weight*(x - mean)*rstd + bias.
//
// coefficients: (mean, var)    -> rstd = 1/sqrt(var + eps)
// vjp, with A = sum over the set of weight*dz, B = of weight*dz*(x - mean), M elements in the set:
//     dx = weight*rstd*dz + q*(x - mean) + r,   q = -rstd^3*B/M,   r = -rstd*A/M
#pragma once

#include "../device.cuh"

namespace normfused {

template <class A> struct Vjp {
    A q, r;
};

namespace standard {
template <class A> NF_DEVICE A reciprocal_deviation(A var, A eps) { return reciprocal_sqrt_(var + eps); }

template <class A> NF_DEVICE Vjp<A> vjp(A rstd, A sum_dz, A sum_dz_xc, A per_element) {  // per_element = 1/M
    return {-rstd * rstd * rstd * sum_dz_xc * per_element, -rstd * sum_dz * per_element};
}
}  // namespace standard

}  // namespace normfused
