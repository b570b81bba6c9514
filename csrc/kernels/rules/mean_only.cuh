// y = weight*(x - mean) + bias: the standard rule with rstd := 1, whose derivative has no term of the variance.
//
// vjp: dx = weight*dz + r,   r = -A/M. The running mean is that of weight*x, before the subtraction.
#pragma once

#include "standard.cuh"

namespace normfused {
namespace mean_only {

template <class A> NF_DEVICE Vjp<A> vjp(A sum_dz, A per_element) { return {A(0), -sum_dz * per_element}; }

}  // namespace mean_only
}  // namespace normfused
