// The static part of a call as one integer, so that an operator takes one argument for it. normfused/backends/cuda/_load.py packs it.
#pragma once

#include <cstdint>

#include "../kernels/problem.h"

namespace normfused {

//  bit 0-1  scope              0 channel, 1 sample_group, 2 position
//  bit 2    layout             0 nchw, 1 nhwc
//  bit 3    centred            1 for rule standard, 0 for rms
//  bit 4    batch_statistics
//  bit 5    cumulative         momentum None
//  bit 6-7  residual_mode      0 none, 1 pre_act, 2 post_act, 3 pre_norm
//  bit 8-15 act                its place in ACTIVATIONS
inline void unpack(int64_t code, Problem& problem) {
    problem.scope = static_cast<Scope>(code & 3);
    problem.layout = static_cast<Layout>(code >> 2 & 1);
    problem.centred = code >> 3 & 1;
    problem.batch_statistics = code >> 4 & 1;
    problem.cumulative = code >> 5 & 1;
    problem.residual_mode = static_cast<ResidualMode>(code >> 6 & 3);
    problem.act = static_cast<Act>(code >> 8 & 255);
}

// What a backward must compute, as the operators take it.
//  bit 0 dx, bit 1 dresidual, bit 2 the parameters' gradients
struct NeedsCode {
    static constexpr int64_t dx = 1, dresidual = 2, parameters = 4;
};

constexpr bool is_code(int64_t code) {
    return code >= 0 && code >> 16 == 0 && (code & 3) <= static_cast<int64_t>(Scope::position) &&
           (code >> 8 & 255) <= static_cast<int64_t>(Act::tlu);
}

}  // namespace normfused
