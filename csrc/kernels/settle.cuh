// Small kernels between or after the large ones, over numbers per set or channel: merging partials where the next launch cannot do it
// itself, and the running statistics of norms whose sets are no channels.
#pragma once

#include "grad_apply.cuh"

namespace normfused {

// Partials of narrow sets of many chunks, or whose columns are spread over several slabs, and of sets whose rule reads the running
// statistics: those of set (outer, s) by one block
template <class A, class Value> NF_DEVICE Value gather_set(const Call& call, int64_t outer, int64_t s, bool weighted) {
    const Walk& w = call.walk;
    const Global<A> partial(call.partial);
    const int64_t width = call.wide ? 1 : w.width;
    Value sum;
    for (int64_t i = thread_index(); i < call.partials * width; i += block_threads()) {
        const int64_t chunk = quotient(i, width), column = s * width + i - chunk * width;
        Value other;
        NF_UNROLL
        for (int q = 0; q < Value::size; ++q) {
            const A v = partial.load_coherent(call.wide ? partial_at<true>(call, outer, 0, chunk, q)
                                                        : partial_at<false>(call, outer, int(column), chunk, q));
            other.set(q, weighted ? v * load_parameter(call.tensors.weight, column, A(1)) : v);
        }
        sum.merge(other);
    }
    return over_set<A>(sum, int(block_threads()), call.scratch_offset);
}

// A block per set: mean and rstd
template <class A> NF_KERNEL(256) settle_sets_kernel(NF_GRID_CONSTANT Call call) {
    const int64_t set = block_index(), outer = quotient(set, call.walk.sets_per_outer);
    const Moments<A> m = gather_set<A, Moments<A>>(call, outer, set - outer * call.walk.sets_per_outer, false);
    if (thread_index() != 0) return;
    finish_set(call, set, m, running_of<A>(call, set), true, counted_batches(call) - 1);  // moments_kernel has counted this batch
}

// A block per set: q and r
template <class A> NF_KERNEL(256) grad_settle_sets_kernel(NF_GRID_CONSTANT Call call) {
    const Arguments& t = call.tensors;
    const int64_t set = block_index(), outer = quotient(set, call.walk.sets_per_outer);
    const bool channel = call.problem.scope == Scope::channel;
    Sums<A, 3> sums = gather_set<A, Sums<A, 3>>(call, outer, set - outer * call.walk.sets_per_outer, !channel);
    if (thread_index() != 0) return;
    if (channel) {
        finish_channel(call, 0, set, sums, Global<A>(t.rstd).load_coherent(set));
        const A weight = load_parameter(t.weight, set, A(1));
        sums.of[sum_dz] *= weight;
        sums.of[sum_dz_xc] *= weight;
    }
    const Pair<A> pair = finish_gradient(call, set, sums);
    Global<A>(const_cast<void*>(t.q)).store(set, pair.first);
    Global<A>(const_cast<void*>(t.r)).store(set, pair.second);
}

// Steps for rules written in PyTorch (sets are (n, c)): merges the chunks into mean and biased variance, or into the two sums
template <class T, bool kWide, class Value, class Store> NF_DEVICE void settle_slices(const Call& call, const Store& store) {
    using A = AccumulatorOf<T>;
    const Slab<T, kWide> slab(call.walk, block_index());
    if constexpr (kWide) {
        const Value sum = over_wide_set(call, slab, gather_partials<T, Value>(call, slab));
        if (slab.speaks()) store(slab.outer, sum);
    } else {
        over_rows<A, Value>(int(call.partials), slab.columns, call.scratch_offset, partial_reader<T, Value>(call, slab),
                            [&](int column, const Value& sum) { store(slab.first_set(call.walk) + column, sum); });
    }
}

template <class T, bool kWide> NF_KERNEL(threads_of<kWide>) settle_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    settle_slices<T, kWide, Moments<A>>(call, [&](int64_t set, const Moments<A>& m) {
        Global<A>(call.tensors.mean).store(set, m.mean());
        Global<A>(call.tensors.rstd).store(set, m.m2 * A(call.per_element));
    });
}

template <class T, bool kWide> NF_KERNEL(threads_of<kWide>) grad_settle_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    settle_slices<T, kWide, Sums<A, 3>>(call, [&](int64_t set, const Sums<A, 3>& sums) {
        const int64_t n = quotient(set, call.problem.C);
        store_channel_sums(call, n, set - n * call.problem.C, sums);
    });
}

// Tracked instance norm: the running statistics take the average over the samples
template <class A> NF_KERNEL(256) average_running_kernel(NF_GRID_CONSTANT Call call) {
    const Problem& p = call.problem;
    const Global<A> means(call.tensors.mean), vars(call.variances);
    const int64_t batches_before = counted_batches(call), step = int64_t(grid_blocks()) * block_threads();
    for (int64_t channel = int64_t(block_index()) * block_threads() + thread_index(); channel < p.C; channel += step) {
        A mean = A(0), var = A(0);
        for (int64_t n = 0; n < p.N; ++n) {
            mean += means.load_coherent(n * p.C + channel);
            var += vars.load_coherent(n * p.C + channel);
        }
        update_running_statistics(call, channel, mean / A(p.N), unbiased(call, var / A(p.N)), batches_before);
    }
}

// num_batches_tracked += 1, where the launch before had to leave it alone
template <class A> NF_KERNEL(32) count_batch_kernel(NF_GRID_CONSTANT Call call) {
    if (thread_index() == 0) Global<int64_t>(call.tensors.counter).store(0, counted_batches(call) + 1);
}

}  // namespace normfused
