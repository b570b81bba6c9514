// The interface of the weight-side kernels: weight norm and spectral norm of many weights in one call. As in steps.h: raw pointers and a
// stream in, a status out; nothing here throws, allocates, synchronises or prints.
#pragma once

#include <cstddef>
#include <cstdint>

#include "steps.h"

namespace normfused {

enum class WeightStep : int { weight_norm, weight_norm_backward, spectral_norm, spectral_norm_backward };

// A weight whose rows are counted along one dimension, seen as (A, R, B): element (a, r, b) at (a*R + r)*B + b. Its matrix is R x A*B;
// column m is a*B + b. Where torch numbers columns otherwise, column m is that of ``column_of`` (normfused/backends/weights.py has more).
struct WeightView {
    uint32_t A = 1, R = 1, B = 1;
    uint32_t period = 0;  // of channels_last: how many neighbouring columns belong to one place of the kernel; 0: torch's order

    constexpr uint32_t columns() const { return A * B; }
    constexpr uint32_t numel() const { return A * R * B; }
    constexpr uint32_t column_of(uint32_t m) const { return period ? m % period * (columns() / period) + m / period : m; }
};

//                          tensors[0]  [1]  [2]  [3]  [4]
//  weight_norm              v           g    w
//  weight_norm_backward     dw          v    g    dg   dv
//  spectral_norm            W           u    v    w           u, v: of the parametrization, updated if there are iterations
//  spectral_norm_backward   dw          W    dW
struct Weight {
    void* tensors[5] = {};
    WeightView view;
};

// Arrays of the accumulator's type hold the values of all weights one after the other.
struct WeightArguments {
    Type type = Type::float32;  // of all tensors
    int iterations = 0;         // of the power method; 0: u and v as they are
    double eps = 0;
    void* norms = nullptr;  // per row: written by weight_norm, read by its backward
    void* u = nullptr;      // per row, column in torch's order and weight: written by spectral_norm, read by its backward
    void* v = nullptr;
    void* sigma = nullptr;
    void* scratch = nullptr;  // weight_scratch_bytes(...) bytes, any content
};

size_t weight_scratch_bytes(WeightStep step, const Weight* weights, int count, Type type);
int run_weights(WeightStep step, const Weight* weights, int count, const WeightArguments& arguments, void* stream);

}  // namespace normfused
