// Step 1, forward: x -> mean and biased variance (of the rms rule: zero and the mean square) of every set.
//
// Each thread sums about a centre that follows its mean; then threads, teams and chunks merge (Chan) in a fixed order. x is read once.
//
// moments_kernel (two_pass): a slab per block; leaves in ``partial``
//     wide:   [element, offset, m2, count][set][chunk]         narrow: [element, offset, m2, count][chunk][outer][column]
// which the next launch merges.
#pragma once

#include "activation.cuh"
#include "call.h"
#include "reduce.cuh"
#include "rules/batch_instance.cuh"
#include "rules/mean_only.cuh"
#include "rules/renorm.cuh"
#include "rules/rms.cuh"
#include "rules/standard.cuh"
#include "slab.cuh"

namespace normfused {

// Lanes with sums of their own
template <class T, bool kWide> constexpr int sum_lanes = kWide ? 1 : vector_size<T>;

// The moments that a thread collects, as sums about a centre: at first an element, then, whenever the thread has met twice as many as when
// it last moved, their mean. So no large numbers are summed: whatever the numbers, the squares about the centre are about twice those about
// the mean at most (in the first two batches, as many times as a batch has elements). And equal numbers have that number for a mean,
// exactly. Lanes of narrow sets have met the same number of elements.
template <class T, bool kWide> struct ThreadMoments {
    using A = AccumulatorOf<T>;
    static constexpr int V = vector_size<T>, kLanes = sum_lanes<T, kWide>;
    A centre[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
    int count = 0, move_at = 1;
    bool centred;

    NF_DEVICE explicit ThreadMoments(bool centred_) : centred(centred_) {}

    NF_DEVICE void give(Moments<A> (&to)[kLanes]) {
        if (centred && count > 0) move();
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) {
            to[j].element = centre[j];
            to[j].offset = centred && count > 0 ? sum[j] / A(count) : A(0);
            to[j].m2 = squares[j] < A(0) ? A(0) : squares[j];
            to[j].count = A(count);
        }
    }

    // Three instructions a number, beside the one that widens it
    template <int K, bool kRegular> NF_DEVICE void add(const Vector<T> (&batch)[K], const Spot<kRegular> (&spots)[K]) {
        if (centred && count == 0) {
            NF_UNROLL
            for (int k = K - 1; k >= 0; --k) {
                if (spots[k].empty()) continue;
                NF_UNROLL
                for (int j = V - 1; j >= 0; --j)
                    if (!kWide || spots[k].has(j)) centre[kWide ? 0 : j] = batch[k].get(j);
            }
        }
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            if (spots[k].empty()) continue;
            count += kWide ? spots[k].lanes() : 1;
            if (!kWide || spots[k].template full<V>()) {
                NF_UNROLL
                for (int j = 0; j < V; ++j) add(kWide ? 0 : j, batch[k].get(j));
            } else {
                NF_UNROLL
                for (int j = 0; j < V; ++j)
                    if (spots[k].has(j)) add(0, batch[k].get(j));
            }
        }
        if (centred && count >= move_at) move();
    }

   private:
    NF_DEVICE void add(int lane, A v) {
        const A d = v - centre[lane];
        sum[lane] += d;
        squares[lane] = fma_(d, d, squares[lane]);
    }
    NF_DEVICE void move() {
        const A share = A(1) / A(count);
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) {
            const A before = centre[j], all = sum[j];
            centre[j] = fma_(all, share, before);
            const A moved = centre[j] - before;
            sum[j] = fma_(-A(count), moved, all);  // what rounding the centre has left
            squares[j] = fma_(-moved, all + sum[j], squares[j]);
        }
        move_at = 2 * count;
    }
};

// The places of a slab's batches in shared memory. The last batch stays in registers, each of the ``resident`` ones before it has a place
// of its own; those before them pass: they will be read again, and until then take turns in the first places, each of which is taken for
// good just after its last guest has been read.
// Where there is room for more than a slab (walk.spare), the places are a ring, in which the next slab follows this one.
// A thread reads only what it has written or copied itself, so that nothing but its own copies need be awaited.
template <int K> struct Landing {
    static constexpr int ahead = landing_ahead;
    static_assert((ahead & (ahead - 1)) == 0, "a power of two");
    int last, passing, ring, threads, base;

    NF_DEVICE Landing(const Call& call, int steps, int base_ = 0)
        : last((steps + K - 1) / K - 1),
          passing(last - call.walk.resident),
          ring(call.walk.resident + call.walk.spare),
          threads(int(block_threads())),
          base(base_) {}
    NF_DEVICE bool stays(int b) const { return b >= passing && b < last; }
    NF_DEVICE int slot(int b, int k) const {
        int place = base + b - passing;
        if (b < passing) place = (b - passing) & (ahead - 1);
        else if (place >= ring) place -= ring;
        return (place * K + k) * threads + int(thread_index());
    }
    NF_DEVICE int vectors() const { return ring * K * threads; }
    NF_DEVICE int next_base() const { return base + last >= ring ? base + last - ring : base + last; }
    // What will be read again should stay in the cache, at the cost of what will not
    NF_DEVICE Cache cache(int b) const { return passing == 0 ? Cache::normal : b < passing ? Cache::evict_last : Cache::evict_first; }
};

// The first pass over a slab
template <class T, bool kWide, int K> NF_DEVICE void collect(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing,
                                                             Vector<T> (&batch)[K],
                                                             Moments<AccumulatorOf<T>> (&moments)[sum_lanes<T, kWide>]) {
    constexpr int V = vector_size<T>, P = part_size<T, any_act>;
    ThreadMoments<T, kWide> own(call.problem.centred());
    const Arguments& t = call.tensors;
    const bool pre_norm = call.problem.residual_mode == ResidualMode::pre_norm;
    auto cursor = slab.start();
    NF_NO_UNROLL
    for (int b = 0; b <= landing.last; ++b) {
        slab.template next<K, true>(cursor, [&](const auto&, const auto& spots) {
            NF_UNROLL
            for (int k = 0; k < K; ++k) batch[k] = slab.load(t.x, spots[k]);
            if (pre_norm) {  // the statistics are those of h as it is stored
                NF_UNROLL
                for (int k = 0; k < K; ++k) {
                    const Vector<T> residual = slab.load(t.residual, spots[k]);
                    NF_UNROLL
                    for (int part = 0; part < V; part += P) {
                        AccumulatorOf<T> h[P];
                        NF_UNROLL
                        for (int j = 0; j < P; ++j) h[j] = batch[k].get(part + j) + residual.get(part + j);
                        batch[k].set(part, h);
                    }
                    slab.store(t.h, spots[k], batch[k]);
                }
            }
            own.add(batch, spots);
            if (landing.stays(b)) {
                const Shared<T> stash = shared_at<T>(0, landing.vectors() * V);
                NF_UNROLL
                for (int k = 0; k < K; ++k)
                    if (!spots[k].empty()) stash.template store<V>(landing.slot(b, k) * V, batch[k].pack());
            }
        });
    }
    own.give(moments);
}

// A batch of the second pass, for b going down. ``held``: the first pass was in this kernel, and the last batch is still there.
template <class T, bool kWide, int K, bool kRegular> NF_DEVICE void recall(const Slab<T, kWide>& slab, const Landing<K>& landing, bool held,
                                                                           int b, const Spot<kRegular> (&spots)[K], const void* tensor,
                                                                           bool written_here, Vector<T> (&batch)[K]) {
    constexpr int V = vector_size<T>;
    if (held && b == landing.last) return;
    if (held && landing.stays(b)) {
        const Shared<T> stash = shared_at<T>(0, landing.vectors() * V);
        NF_UNROLL
        for (int k = 0; k < K; ++k)
            if (!spots[k].empty()) batch[k] = stash.template load<V>(landing.slot(b, k) * V);
    } else if (written_here) {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = slab.template load<true>(tensor, spots[k]);
    } else {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = slab.load(tensor, spots[k]);
    }
}

// Two numbers per set, for the lanes that need them
template <class A> struct Pair {
    A first, second;
};

// The values that the threads of a narrow slab hold -> on_column(column, value) by one thread per column. Lanes of a warp that are of the
// same columns meet by shuffles, where teams are a power of two: the table that the others meet in takes shared memory from the slab.
template <class T, class Value, class OnColumn>
NF_DEVICE void over_teams(const Call& call, const Slab<T, false>& slab, Value (&v)[vector_size<T>], const OnColumn& on_column) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, P = V < 4 ? V : 4;
    const bool folds = call.walk.folds;
    const int rows = folds ? int(block_threads()) / 32 : slab.teams, row = folds ? int(warp_index()) : slab.row_lane();
    if (folds) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) v[j] = over_lanes(v[j], 32, slab.team);
    }
    const Table<A, Value> table(call.scratch_offset, rows, slab.team * V);
    if (row < rows && (!folds || int(lane_index()) < slab.team)) {
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) NF_UNROLL
        for (int part = 0; part < V; part += P) {
            Pack<A, P> numbers;
            NF_UNROLL
            for (int j = 0; j < P; ++j) numbers.data[j] = v[part + j].get(i);
            table.numbers.template store<P>(table.slot(row, i, slab.column(part)), numbers);
        }
    }
    sync_block();
    over_rows<A, Value>(
        rows, slab.team * V, call.scratch_offset, [&](int r, int column) { return table.get(r, column); },
        [&](int column, const Value& value) {
            if (column < slab.columns) on_column(column, value);
        });
}

// Values per column -> per set, for sets [begin, end) of the slab: read(row, column) of ``rows`` rows; on_column may change a column's
// value before it joins its set's. on_column and on_set(set of the slab, value) are called by one thread each.
template <class T, class Value, class Read, class OnColumn, class OnSet>
NF_DEVICE void over_columns(const Call& call, int begin, int end, int rows, const Read& read, const OnColumn& on_column,
                            const OnSet& on_set) {
    using A = AccumulatorOf<T>;
    const int width = int(call.walk.width), first = begin * width, columns = (end - begin) * width;
    if (columns <= 0) return;
    const Table<A, Value> table(call.scratch_offset, 1, columns);
    over_rows<A, Value>(
        rows, columns, call.scratch_offset, [&](int row, int column) { return read(row, first + column); },
        [&](int column, Value v) {
            on_column(first + column, v);
            if (width == 1) on_set(begin + column, v);
            else table.set(0, column, v);
        });
    if (width == 1) return;
    sync_block();
    int fold = 1;  // threads that share the columns of a set
    while (fold < 32 && fold * 2 <= width) fold *= 2;
    const int groups = int(block_threads()) / fold, group = int(thread_index()) / fold, member = int(thread_index()) % fold;
    for (int start = 0; start < end - begin; start += groups) {
        const int set = start + group;
        Value sum;
        NF_NO_UNROLL
        for (int c = member; c < width && set < end - begin; c += fold) sum.merge(table.get(0, set * width + c));
        sum = over_lanes(sum, fold);
        if (member == 0 && set < end - begin) on_set(begin + set, sum);
    }
}

// Two numbers per set of a narrow slab, from the threads that found them to the lanes of all
template <class T> struct SetNumbers {
    using A = AccumulatorOf<T>;
    static constexpr int V = vector_size<T>;
    int columns;
    Shared<A> numbers;

    NF_DEVICE SetNumbers(const Call& call, const Slab<T, false>& slab)
        : columns(slab.team * V), numbers(shared_at<A>(call.columns_offset, 2 * columns)) {}
    NF_DEVICE void leave(int set, const Pair<A>& pair) const {
        numbers.set(set, pair.first);
        numbers.set(columns + set, pair.second);
    }
    NF_DEVICE Pair<A> get(int set) const { return {numbers.get(set), numbers.get(columns + set)}; }
    // They are left again only behind the barriers of the next slab
    NF_DEVICE void take(const Call& call, const Slab<T, false>& slab, A (&first)[V], A (&second)[V]) const {
        sync_block();
        NF_UNROLL
        for (int j = 0; j < V; ++j) {
            const int set = slab.set_of_column(call.walk, uint32_t(slab.column(j)));
            first[j] = slab.has(j) ? numbers.get(set) : A(0);
            second[j] = slab.has(j) ? numbers.get(columns + set) : A(0);
        }
    }
};

// The same for all sets of the slab, whose two numbers reach the lanes of every thread
template <class T, class Value, class Read, class OnColumn, class OnSet>
NF_DEVICE void over_narrow_sets(const Call& call, const Slab<T, false>& slab, int rows, const Read& read, const OnColumn& on_column,
                                const OnSet& on_set, AccumulatorOf<T> (&first)[vector_size<T>],
                                AccumulatorOf<T> (&second)[vector_size<T>]) {
    const SetNumbers<T> numbers(call, slab);
    over_columns<T, Value>(call, 0, slab.sets(call.walk), rows, read, on_column,
                           [&](int set, const Value& value) { numbers.leave(set, on_set(set, value)); });
    numbers.take(call, slab, first, second);
}

// Values of threads -> of the set, for all threads of it
template <class T, class Value> NF_DEVICE Value over_wide_set(const Call& call, const Slab<T, true>& slab, const Value& v) {
    const int threads = call.walk.sets_per_block > 1 ? slab.team * slab.teams : int(block_threads());
    return over_set<AccumulatorOf<T>>(v, threads, call.scratch_offset);
}

// ------------------------------------------------------------------------------------------------- sets and running statistics
template <class A> struct Statistics {
    A mean, rstd;
};

template <class A> NF_DEVICE A eps_of(const Call& call, int64_t set) {
    const A eps = A(call.problem.eps);
    if (call.problem.rule != Rule::rms || call.tensors.rule_weight.data == nullptr) return eps;
    return rms::effective_eps(eps, load_parameter(call.tensors.rule_weight, set % call.problem.C, A(0)));
}

// running <- (1 - factor)*running + factor*value, rounded once
template <class A> NF_DEVICE void update_running(const Parameter& running, int64_t channel, A value, double factor) {
    const double old = load_parameter(running, channel, 0.0);
    store_parameter(running, channel, A(old * (1.0 - factor) + double(value) * factor));
}

// ``mean`` and ``spread``: what joins the running statistics
template <class A> NF_DEVICE void update_running_statistics(const Call& call, int64_t channel, A mean, A spread, int64_t batches_before) {
    const double factor = call.problem.cumulative ? (call.tensors.counter ? 1.0 / double(batches_before + 1) : 1.0) : call.problem.momentum;
    if (call.tensors.running_mean.data) update_running(call.tensors.running_mean, channel, mean, factor);
    if (call.tensors.running_var.data) update_running(call.tensors.running_var, channel, spread, factor);
}

// One element has no unbiased variance: NaN, as 0/0 says
template <class A> NF_DEVICE A unbiased(const Call& call, A var) { return A(var * A(call.count) / A(call.count - 1)); }

// The running statistics that a set's coefficients depend on, or that take the place of the batch's (batch-instance norm). All that finish
// the set must have read them before one of them, behind a barrier, moves them on.
NF_DEVICE bool needs_running(const Call& call) { return call.problem.rule == Rule::renorm || !call.problem.batch_statistics; }
template <class A> NF_DEVICE Running<A> running_of(const Call& call, int64_t set) {
    return {load_parameter(call.tensors.running_mean, set, A(0)), load_parameter(call.tensors.running_var, set, A(1))};
}

// Moments of a set -> its statistics; ``writer`` (one thread of all that know the set) stores them.
template <class A> NF_DEVICE Statistics<A> finish_set(const Call& call, int64_t set, const Moments<A>& m, const Running<A>& running,
                                                      bool writer, int64_t batches_before) {
    const Arguments& t = call.tensors;
    const Rule rule = call.problem.rule;
    const bool given = !call.problem.batch_statistics;
    const A mean = given ? running.mean : m.mean(), var = given ? running.deviation : m.m2 * A(call.per_element),
            eps = eps_of<A>(call, set);
    Statistics<A> s = {mean, rule == Rule::mean_only ? A(1) : standard::reciprocal_deviation(var, eps)};
    A running_value = mean, running_spread = A(0);
    if (rule == Rule::renorm) {
        running_spread = sqrt_(var + eps);
        const renorm::Correction<A> c =
            renorm::correction(mean, running_spread, running, load_parameter(t.r_max, 0, A(1)), load_parameter(t.d_max, 0, A(0)));
        s.rstd *= c.r;
        s.mean -= renorm::shift(s.rstd, c);
        if (writer) {
            Global<A>(t.rstd).store(renorm::saved_r * call.problem.C + set, c.r);
            Global<A>(t.rstd).store(renorm::saved_d * call.problem.C + set, c.d);
        }
    }
    if (writer) {
        if (t.mean) Global<A>(t.mean).store(set, s.mean);
        if (t.rstd) Global<A>(t.rstd).store(set, s.rstd);
        if (call.variances) Global<A>(call.variances).store(set, var);
        if (rule == Rule::mean_only) running_value *= load_parameter(t.weight, set, A(1));
        if (rule != Rule::renorm) running_spread = unbiased(call, var);
        if (call.problem.scope == Scope::channel && !given)
            update_running_statistics(call, set, running_value, running_spread, batches_before);
    }
    return s;
}

NF_DEVICE int64_t counted_batches(const Call& call) {
    return call.tensors.counter ? Global<int64_t>(call.tensors.counter).load_coherent(0) : 0;
}

// ------------------------------------------------------------------------------------------------------------- two_pass
template <bool kWide> NF_DEVICE int64_t partial_at(const Call& call, int64_t outer, int column, int64_t chunk, int quantity) {
    const Walk& w = call.walk;
    return kWide ? (quantity * w.outers + outer) * call.partials + chunk
                 : ((quantity * call.partials + chunk) * w.outers + outer) * w.cols + column;
}

template <class A, bool kWide, class Value>
NF_DEVICE void store_partial(const Call& call, int64_t outer, int column, int chunk, const Value& v) {
    const Global<A> partial(call.partial);
    NF_UNROLL
    for (int i = 0; i < Value::size; ++i) partial.store(partial_at<kWide>(call, outer, column, chunk, i), v.get(i));
}
template <class A, bool kWide, class Value> NF_DEVICE Value load_partial(const Call& call, int64_t outer, int column, int chunk) {
    const Global<A> partial(call.partial);
    Value v;
    NF_UNROLL
    for (int i = 0; i < Value::size; ++i) v.set(i, partial.load_coherent(partial_at<kWide>(call, outer, column, chunk, i)));
    return v;
}

// Reduces what the threads hold, and writes it for the next launch: of a slab's set (wide) or columns (narrow)
template <class T, bool kWide, class Value>
NF_DEVICE void leave_partials(const Call& call, const Slab<T, kWide>& slab, Value (&v)[sum_lanes<T, kWide>]) {
    using A = AccumulatorOf<T>;
    if constexpr (kWide) {
        const Value sum = over_wide_set(call, slab, v[0]);
        if (slab.speaks()) store_partial<A, true>(call, slab.outer, 0, slab.chunk, sum);
    } else {
        over_teams(call, slab, v, [&](int column, const Value& sum) {
            store_partial<A, false>(call, slab.outer, slab.column0 + column, slab.chunk, sum);
        });
    }
}

// Reads them back. Wide: chunks of the set, all or those from ``first`` up to ``last``, shared out over its threads; narrow: a reader for
// over_rows, chunk by chunk.
template <class T, class Value> NF_DEVICE Value gather_partials(const Call& call, const Slab<T, true>& slab, int64_t first, int64_t last) {
    Value v;
    if (!slab.live || slab.row_lane() >= slab.teams) return v;
    NF_NO_UNROLL
    for (int chunk = int(first) + slab.row_lane() * slab.team + slab.lane; chunk < last; chunk += slab.team * slab.teams)
        v.merge(load_partial<AccumulatorOf<T>, true, Value>(call, slab.outer, 0, chunk));
    return v;
}
template <class T, class Value> NF_DEVICE Value gather_partials(const Call& call, const Slab<T, true>& slab) {
    return gather_partials<T, Value>(call, slab, 0, call.partials);
}
template <class T, class Value> NF_DEVICE auto partial_reader(const Call& call, const Slab<T, false>& slab) {
    return
        [&](int chunk, int column) { return load_partial<AccumulatorOf<T>, false, Value>(call, slab.outer, slab.column0 + column, chunk); };
}

template <class T, bool kWide> NF_KERNEL(threads_of<kWide>) moments_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Slab<T, kWide> slab(call.walk, block_index());
    Moments<A> m[kLanes];
    Vector<T> batch[moments_batch];
    collect<T, kWide, moments_batch>(call, slab, Landing<moments_batch>(call, slab.steps), batch, m);
    leave_partials<T, kWide>(call, slab, m);
    // Nobody reads the counter in this launch; the next one reads it already counted
    if (call.problem.scope == Scope::channel && call.tensors.counter && block_index() == 0 && thread_index() == 0)
        Global<int64_t>(call.tensors.counter).store(0, counted_batches(call) + 1);
}

}  // namespace normfused
