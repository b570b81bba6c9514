// What a kernel is given: one trivially copyable struct, passed by value.
#pragma once

#include "problem.h"
#include "steps.h"
#include "walk.h"

namespace normfused {

constexpr int forward_batch = 2, moments_batch = 4, gradient_batch = 1;  // vectors that a thread holds at a time
constexpr int landing_ahead = 4;  // batches on their way to shared memory (unmeasured; of two blocks of 256 threads 64 KB)
// Threads that a block may have: 128 registers each, and 168 where every lane has sums and coefficients of its own (narrow sets)
template <bool kWide> constexpr int threads_of = kWide ? 512 : 384;

// Activations with kernels of their own (kernels.cuh); the others share one, which may have a parameter's gradient to sum
constexpr bool own_instantiation(const Problem& p) {
    return p.rule != Rule::batch_instance && p.type != Type::float64 &&
           (p.act == Act::identity || p.act == Act::relu || p.act == Act::leaky_relu || p.act == Act::silu);
}

// What a set is held by between the two passes of a single pass: a block, or (walk.chunks of them) the blocks of a cluster, which see each
// other's shared memory, or a group of blocks that a cooperative launch keeps on the device together.
enum class Owner : int { block, cluster, group };

struct Call {
    Problem problem;
    Walk walk;
    float p0, p1;         // the problem's: converted on the device, they would be again for every vector
    Arguments tensors;
    Needs needs;
    int64_t count;        // elements of a set
    double per_element;   // 1/count
    int scratch_offset;   // of the shared memory: the reductions' part, behind the slab
    int columns_offset;   // narrow sets of several columns: sums per column and per set
    bool wide;            // whether a set is a whole matrix of the walk
    Owner owner;          // who holds a set between the two passes over it
    int exchange_offset;  // of the blocks of a cluster: a value each
    int group_words;      // arrival words: from here on one for each group of co-resident blocks
    bool streams;         // part of the slab will be read again and should stay in the cache: stores should not
    int sums_offset;      // position sets' gradients: sums per channel that a block keeps over its slabs; -1: it does not
    void* pairs[2];       // narrow sets that groups hold: mean and rstd, or q and r, for all blocks of the group
    void* partial;        // what slabs of one set leave for the next launch: moments.cuh, grad_moments.cuh
    int64_t partials;     // chunks that wrote it
    bool scales_by_q;     // rms sets of one element: grad_apply.cuh
    bool settled;         // mean and rstd are final (settle.cuh)
    void* variances;      // tracked sample groups: biased variance per set, for average_running_kernel
    void* channel_sums[3];  // sums of dz, of dz*(x - mean), of act_weight's gradient before the sum over entries: [entry][C]
    int64_t entries;        // samples (times chunks), or blocks
    bool finish;            // the last block to arrive sums the entries in this launch
};

}  // namespace normfused
