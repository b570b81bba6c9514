// The static part of a call as one integer, so that an operator takes one argument for it. normfused/backends/cuda/_load.py packs it.
#pragma once

#include <cstdint>

#include "../kernels/problem.h"

namespace normfused {

//  bit 0-1  scope              0 channel, 1 sample_group, 2 position
//  bit 2    layout             0 nchw, 1 nhwc
//  bit 3    batch_statistics
//  bit 4    cumulative         momentum None
//  bit 5    unused
//  bit 6-7  residual_mode      0 none, 1 pre_act, 2 post_act, 3 pre_norm
//  bit 8-13 act                its place in ACTIVATIONS
//  bit 14-16 rule             0 standard, 1 rms, 2 mean_only, 3 renorm, 4 batch_instance
inline void unpack(int64_t code, Problem& problem) {
    problem.scope = static_cast<Scope>(code & 3);
    problem.layout = static_cast<Layout>(code >> 2 & 1);
    problem.batch_statistics = code >> 3 & 1;
    problem.cumulative = code >> 4 & 1;
    problem.residual_mode = static_cast<ResidualMode>(code >> 6 & 3);
    problem.act = static_cast<Act>(code >> 8 & 63);
    problem.rule = static_cast<Rule>(code >> 14 & 7);
}

// What a backward must compute, as the operators take it.
//  bit 0 dx, bit 1 dresidual, bit 2 the parameters' gradients
struct NeedsCode {
    static constexpr int64_t dx = 1, dresidual = 2, parameters = 4;
};

constexpr bool is_code(int64_t code) {
    return code >= 0 && code >> 17 == 0 && (code & 3) <= static_cast<int64_t>(Scope::position) &&
           (code >> 14 & 7) <= static_cast<int64_t>(Rule::batch_instance) && (code >> 8 & 63) <= static_cast<int64_t>(Act::tlu);
}

}  // namespace normfused
