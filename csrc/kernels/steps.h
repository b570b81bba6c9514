// The interface of the kernels: raw pointers and a stream in, a status out. Nothing here throws, allocates, synchronises or prints.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace normfused {

// What of a device a plan depends on; defaults are an H200's.
struct Limits {
    int processors = 132;
    int shared_bytes_per_block = 232448;  // opt-in maximum
    int shared_bytes_per_processor = 233472;
    int threads_per_processor = 2048;
    int largest_cluster = 8;   // blocks; 1: the device has no clusters. 8 is what every device with clusters takes
    int spare_processors = 0;  // that cooperative launches leave to kernels running beside them (collectives)
};

struct Needs {  // of a backward
    bool dx = true, dresidual = true, parameters = true;
};

// Every tensor of every step; null where absent. Dense in the problem's layout, at element 0. Accumulator type: float64 for float64,
// else float32. Sets are numbered c | n*groups + g | n*S + s.
struct Arguments {
    // forward (also inputs of the backward)
    const void* x = nullptr;         // in pre_norm mode the backward is given h here
    const void* residual = nullptr;  // backward: where z must be recomputed (pre_act, no mask)
    void* y = nullptr;
    void* h = nullptr;        // pre_norm: x + residual
    uint8_t* mask = nullptr;  // mask_bytes(problem) bytes; written by the forward, read by the backward
    void* mean = nullptr;     // accumulator, per set. Not written by the rms rule
    void* rstd = nullptr;     // accumulator, per set; of Step::moments: the biased variance; of the renorm rule [scale, r, d][set]
    Parameter weight, bias, act_weight, rule_weight;
    Parameter running_mean, running_var;  // updated with batch statistics, else read; of the renorm rule running_var is the deviation
    Parameter r_max, d_max;               // of the renorm rule, a value each
    int64_t* counter = nullptr;           // num_batches_tracked
    const void* scale = nullptr;          // Step::apply and on: z = scale*x + shift, accumulator, per (n, c)
    const void* shift = nullptr;
    const void* residual_scale = nullptr;  // Step::apply and on, pre_act: its factor in z, accumulator, one value; null for 1
    const void* shift_after = nullptr;     // Step::apply: accumulator, per (n, c)
    void* shifted = nullptr;               // Step::apply: y + shift_after; y may be null then
    // backward
    const void* dy = nullptr;
    const void* dh = nullptr;
    const void* dshifted = nullptr;  // Step::grad_moments, grad_apply: joins dy
    void* dx = nullptr;
    void* dresidual = nullptr;
    Parameter dweight, dbias, dact_weight, drule_weight;
    void* sum_dz = nullptr;  // Step::grad_moments: accumulator, per (n, c)
    void* sum_dz_xc = nullptr;
    const void* against = nullptr;   // Step::grad_moments: sum_dz_xc is of dz*against instead; the residual, where z has one
    const void* dz_scale = nullptr;  // Step::grad_apply: accumulator, per (n, c)
    const void* q = nullptr;
    const void* r = nullptr;
    // workspace
    void* scratch = nullptr;       // Requirements::scratch_bytes, any content
    uint32_t* arrivals = nullptr;  // Requirements::arrivals words at rest (device.cuh); left so by the kernels
};

enum Status : int { ok = 0, not_supported = -1, emulation_failed = -2 };  // positive: a cudaError_t

// Bytes of the bit mask: one byte per 16-byte vector of a contiguous run (docs/architecture.md has the layout).
int64_t mask_bytes(const Problem& problem);

struct Requirements {
    size_t scratch_bytes;
    uint32_t arrivals;  // words of the pool; 0: none needed
};

// The plan's consequences for the caller. ``pool``: whether arrival words can be had (without, more launches are made).
Requirements requirements(const Problem& problem, Step step, const Needs& needs, const Limits& limits, bool pool);

// Runs a step. ``args.arrivals`` null means: no pool.
int run(const Problem& problem, Step step, const Needs& needs, const Limits& limits, const Arguments& args, void* stream);

// One line of JSON about the plan (route, blocks, threads, shared bytes, how often x is read) written to ``text``; its length.
int describe(const Problem& problem, Step step, const Needs& needs, const Limits& limits, bool pool, char* text, int size);

}  // namespace normfused
