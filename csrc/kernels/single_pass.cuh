// moments -> coefficients -> apply in one launch: the set stays in registers and shared memory between its statistics and its output.
//
// A slab is all rows of its sets, or a share of them (owners.cuh): of one set (wide), several small ones (wide, a group of lanes each), or
// the sets of a slice of columns (narrow). Reads x once and writes y once (2T); where the slab does not fit (walk.resident) the first part
// of it is read again. The running statistics move in the same launch. With a cumulative average every block reads the counter, so only the
// last of them to finish may move it on.
#pragma once

#include "samples.cuh"

namespace normfused {

// ``kApart``: with statistics of every sample, too (samples.cuh)
template <class T, bool kWide, bool kRows, int kAct, bool kApart> NF_KERNEL(threads_of<kWide>)
single_pass_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    const int64_t batches_before = call.problem.cumulative ? counted_batches(call) : 0;
    Coefficients<T, kWide, kRows> c;
    int base = 0, early = 0;  // place of the slab's first batch in the ring, batches that were asked for before their slab's turn
    for (int64_t unit = block_index(); unit < call.walk.units; unit += grid_blocks()) {
        const Slab<T, kWide> slab(call.walk, unit);
        const Landing<forward_batch> landing(call, slab.steps, base);
        Moments<A> m[sum_lanes<T, kWide>];
        Vector<T> batch[forward_batch];
        if constexpr (kWide == kRows) {
            collect_ahead(call, slab, landing, early, batch, m);
            if (call.walk.spare > 0 && unit + grid_blocks() < call.walk.units) {  // loads for while this block waits and stores
                const Slab<T, kWide> next(call.walk, unit + grid_blocks());
                const Landing<forward_batch> place(call, next.steps, base = landing.next_base());
                auto cursor = next.start();
                const Shared<T> stash = shared_at<T>(0, place.vectors() * vector_size<T>);
                early = min_(call.walk.spare, place.last);
                NF_NO_UNROLL
                for (int b = 0; b < early; ++b) ask(call, next, place, next.at_corner(t.x), stash, cursor, b);
            }
        } else {
            collect(call, slab, landing, batch, m);
        }
        if constexpr (kApart) {
            finish_samples<T, kWide, kRows>(call, slab, m, batches_before, c);
        } else {
            finish_sets<T, kWide, kRows>(call, slab, m, false, batches_before, c);
            c.renew(call, slab);
        }
        apply_slab<T, kWide, kRows, kAct>(call, slab, landing, true, batch, c, NormEpilogue());
    }
    leave_owners(call);
    if (call.problem.scope == Scope::channel && call.problem.batch_statistics && t.counter) {
        const Global<int64_t> counter(t.counter);
        const bool last = call.problem.cumulative ? last_to_arrive(Global<uint32_t>(t.arrivals), grid_blocks()) : block_index() == 0;
        if (last && thread_index() == 0) counter.store(0, counter.load_coherent(0) + 1);
    }
}

}  // namespace normfused
