// Step 1, forward: x -> mean and biased variance (of the rms rule: zero and the mean square) of every set.
//
// Each thread takes the exact two-pass moments of a batch of vectors that it holds in registers, and merges them with what it has
// (Chan); then threads, teams and chunks merge in a fixed order. x is read once; 5 instructions per element and one division per batch.
//
// moments_kernel (two_pass): a slab per block; leaves in ``partial``
//     wide:   [element, offset, m2, count][set][chunk]         narrow: [element, offset, m2, count][chunk][outer][column]
// which the next launch merges.
#pragma once

#include "activation.cuh"
#include "call.h"
#include "reduce.cuh"
#include "rules/rms.cuh"
#include "rules/standard.cuh"
#include "slab.cuh"

namespace normfused {

// Lanes with sums of their own
template <class T, bool kWide> constexpr int sum_lanes = kWide ? 1 : vector_size<T>;

template <class T, bool kWide, int K>
NF_DEVICE void add_batch(const Vector<T> (&batch)[K], const Spot (&spots)[K], bool centred,
                         Moments<AccumulatorOf<T>> (&moments)[sum_lanes<T, kWide>]) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, kLanes = sum_lanes<T, kWide>;
    // Deviations from an element of the batch: the mean of equal numbers is exact, and no large numbers are summed
    A shift[kLanes] = {}, sum[kLanes] = {}, m2[kLanes] = {}, v[V];
    unpack<T>(batch[0], v);
    if (centred) {
        if (!kWide) {
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) shift[j] = v[j];
        } else {
            NF_UNROLL
            for (int j = V - 1; j >= 0; --j) shift[0] = j >= spots[0].first && j < spots[0].last ? v[j] : shift[0];
        }
    }
    int n = 0;
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        const int lanes = spots[k].last - spots[k].first;
        n += kWide ? lanes : lanes > 0;
        unpack<T>(batch[k], v);
        if (lanes == V || (!kWide && lanes > 0)) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) sum[kWide ? 0 : j] += v[j] - shift[kWide ? 0 : j];
        } else if (kWide && lanes > 0) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) sum[0] += j >= spots[k].first && j < spots[k].last ? v[j] - shift[0] : A(0);
        }
    }
    if (n == 0) return;
    const A share = A(1) / A(n);
    A offset[kLanes];
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) offset[j] = centred ? sum[j] * share : A(0);
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        const int lanes = spots[k].last - spots[k].first;
        unpack<T>(batch[k], v);
        if (lanes == V || (!kWide && lanes > 0)) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) {
                const A d = v[j] - shift[kWide ? 0 : j] - offset[kWide ? 0 : j];
                m2[kWide ? 0 : j] = fma_(d, d, m2[kWide ? 0 : j]);
            }
        } else if (kWide && lanes > 0) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) {
                const A d = j >= spots[k].first && j < spots[k].last ? v[j] - shift[0] - offset[0] : A(0);
                m2[0] = fma_(d, d, m2[0]);
            }
        }
    }
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) {
        Moments<A> add;
        add.element = shift[j];
        add.offset = offset[j];
        add.m2 = m2[j];
        add.count = A(n);
        moments[j].merge(add);
    }
}

// The first pass over a slab. The last batch stays in ``batch``, the ``resident`` ones before it in shared memory.
template <class T, bool kWide, int K>
NF_DEVICE void collect(const Call& call, const Slab<T, kWide>& slab, Vector<T> (&batch)[K],
                       Moments<AccumulatorOf<T>> (&moments)[sum_lanes<T, kWide>]) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>;
    const Arguments& t = call.tensors;
    const bool pre_norm = call.problem.residual_mode == ResidualMode::pre_norm;
    const int batches = (slab.steps + K - 1) / K, threads = int(block_threads());
    auto cursor = slab.start();
    for (int b = 0; b < batches; ++b) {
        Spot spots[K];
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            spots[k] = slab.spot(cursor);
            slab.advance(cursor);
            batch[k] = slab.load(t.x, spots[k]);
        }
        if (pre_norm) {  // the statistics are those of h as it is stored
            NF_UNROLL
            for (int k = 0; k < K; ++k) {
                A v[V], r[V];
                unpack<T>(batch[k], v);
                unpack<T>(slab.load(t.residual, spots[k]), r);
                NF_UNROLL
                for (int j = 0; j < V; ++j) v[j] += r[j];
                batch[k] = pack<T>(v);
                slab.store(t.h, spots[k], batch[k]);
            }
        }
        add_batch<T, kWide, K>(batch, spots, call.problem.centred, moments);
        const int kept = b - (batches - 1 - call.walk.resident);
        if (kept >= 0 && b + 1 < batches) {
            const Shared<T> stash = shared_at<T>(0, call.walk.resident * K * threads * V);
            NF_UNROLL
            for (int k = 0; k < K; ++k) stash.template store<V>(((kept * K + k) * threads + int(thread_index())) * V, batch[k]);
        }
    }
}

// A batch of the second pass, for b going down; the last one is still there.
template <class T, bool kWide, int K>
NF_DEVICE void recall(const Call& call, const Slab<T, kWide>& slab, int b, int batches, const Spot (&spots)[K], const void* tensor,
                      bool written_here, int offset, Vector<T> (&batch)[K]) {
    constexpr int V = vector_size<T>;
    if (b + 1 == batches) return;
    const int kept = b - (batches - 1 - call.walk.resident), threads = int(block_threads());
    if (kept >= 0) {
        const Shared<T> stash = shared_at<T>(offset, call.walk.resident * K * threads * V);
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = stash.template load<V>(((kept * K + k) * threads + int(thread_index())) * V);
    } else if (written_here) {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = slab.template load<true>(tensor, spots[k]);
    } else {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = slab.load(tensor, spots[k]);
    }
}

// Values of neighbouring columns -> of the sets they belong to (``width`` columns each, counted from the slab's first).
template <class A, int V, class Value>
NF_DEVICE void over_columns(Value (&v)[V], int width, int columns, int lane, bool writer, int offset) {
    if (width == 1) return;
    const int sets = columns / width;
    const Shared<A> of_columns = shared_at<A>(offset, Value::size * (columns + sets));
    const auto column_slot = [&](int i, int column) { return i * columns + column; };
    const auto set_slot = [&](int i, int set) { return Value::size * columns + i * sets + set; };
    if (writer) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) {
            if (lane * V + j >= columns) continue;
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) of_columns.set(column_slot(i, lane * V + j), v[j].get(i));
        }
    }
    sync_block();
    int fold = 1;  // threads that share the columns of a set
    while (fold < 32 && fold * 2 <= width) fold *= 2;
    const int groups = int(block_threads()) / fold, group = int(thread_index()) / fold, member = int(thread_index()) % fold;
    for (int first = 0; first < sets; first += groups) {
        const int set = first + group;
        Value sum;
        for (int c = member; c < width; c += fold) {
            if (set >= sets) break;
            Value other;
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) other.set(i, of_columns.get(column_slot(i, set * width + c)));
            if (c == member) sum = other;
            else sum.merge(other);
        }
        sum = over_lanes(sum, fold);
        if (member == 0 && set < sets) {
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) of_columns.set(set_slot(i, set), sum.get(i));
        }
    }
    sync_block();
    NF_UNROLL
    for (int j = 0; j < V; ++j) {
        const int column = lane * V + j;
        if (column >= columns) continue;
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) v[j].set(i, of_columns.get(set_slot(i, column / width)));
    }
    sync_block();
}

// Values of threads -> of sets, for every lane of every thread
template <class T, bool kWide, class Value>
NF_DEVICE void over_sets(const Call& call, const Slab<T, kWide>& slab, Value (&v)[sum_lanes<T, kWide>], bool fold_columns = true) {
    using A = AccumulatorOf<T>;
    if constexpr (kWide) {
        const int threads = call.walk.sets_per_block > 1 ? slab.team * slab.teams : int(block_threads());
        v[0] = over_set<A>(v[0], threads, call.scratch_offset);
    } else {
        over_teams<A, vector_size<T>>(v, slab.team, slab.teams, slab.lane, slab.row_lane, call.scratch_offset);
        if (fold_columns)
            over_columns<A, vector_size<T>>(v, int(call.walk.width), slab.columns, slab.lane, slab.row_lane == 0, call.columns_offset);
    }
}

// ------------------------------------------------------------------------------------------------- sets and running statistics
template <class A> struct Statistics {
    A mean, rstd;
};

template <class A> NF_DEVICE A eps_of(const Call& call, int64_t set) {
    const A eps = A(call.problem.eps);
    if (call.tensors.eps_weight.data == nullptr) return eps;
    return rms::effective_eps(eps, load_parameter(call.tensors.eps_weight, set % call.problem.C, A(0)));
}

// running <- (1 - factor)*running + factor*value, rounded once
template <class A> NF_DEVICE void update_running(const Parameter& running, int64_t channel, A value, double factor) {
    const double old = load_parameter(running, channel, 0.0);
    store_parameter(running, channel, A(old * (1.0 - factor) + double(value) * factor));
}

template <class A>
NF_DEVICE void update_running_statistics(const Call& call, int64_t channel, A mean, A var, int64_t batches_before) {
    const double factor = call.problem.cumulative ? (call.tensors.counter ? 1.0 / double(batches_before + 1) : 1.0) : call.problem.momentum;
    if (call.tensors.running_mean.data) update_running(call.tensors.running_mean, channel, mean, factor);
    if (call.tensors.running_var.data)  // one element has no unbiased variance: NaN, as 0/0 says
        update_running(call.tensors.running_var, channel, A(var * A(call.count) / A(call.count - 1)), factor);
}

// Moments of a set -> its statistics; ``writer`` (one thread of all that know the set) stores them.
template <class A> NF_DEVICE Statistics<A> finish_set(const Call& call, int64_t set, const Moments<A>& m, bool writer, int64_t batches_before) {
    const Arguments& t = call.tensors;
    const A var = m.m2 / A(call.count);
    const Statistics<A> s = {m.mean(), standard::reciprocal_deviation(var, eps_of<A>(call, set))};
    if (writer) {
        if (t.mean) Global<A>(t.mean).store(set, s.mean);
        if (t.rstd) Global<A>(t.rstd).store(set, s.rstd);
        if (call.variances) Global<A>(call.variances).store(set, var);
        if (call.problem.scope == Scope::channel) update_running_statistics(call, set, s.mean, var, batches_before);
    }
    return s;
}

NF_DEVICE int64_t counted_batches(const Call& call) {
    return call.tensors.counter ? Global<int64_t>(call.tensors.counter).load_coherent(0) : 0;
}

// ------------------------------------------------------------------------------------------------------------- two_pass
template <bool kWide> NF_DEVICE int64_t partial_at(const Call& call, int64_t outer, int column, int64_t chunk, int quantity) {
    const Walk& w = call.walk;
    return kWide ? (quantity * w.outers + outer) * call.partials + chunk : ((quantity * call.partials + chunk) * w.outers + outer) * w.cols + column;
}

// Writes the values of a slab's set (wide) or columns (narrow) for the next launch
template <class T, bool kWide, class Value>
NF_DEVICE void leave_partial(const Call& call, const Slab<T, kWide>& slab, const Value (&v)[sum_lanes<T, kWide>]) {
    const Global<AccumulatorOf<T>> partial(call.partial);
    if (!slab.speaks()) return;
    NF_UNROLL
    for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
        if (!slab.has(j)) continue;
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i)
            partial.store(partial_at<kWide>(call, slab.outer, slab.column0 + slab.column(j), slab.chunk, i), v[j].get(i));
    }
}

// Reads them back, all chunks: each thread its share, to be merged by over_sets
template <class T, bool kWide, class Value>
NF_DEVICE void gather_partials(const Call& call, const Slab<T, kWide>& slab, Value (&v)[sum_lanes<T, kWide>]) {
    const Global<AccumulatorOf<T>> partial(call.partial);
    const int first = kWide ? slab.row_lane * slab.team + slab.lane : slab.row_lane, step = kWide ? slab.team * slab.teams : slab.teams;
    if (!slab.live || slab.row_lane >= slab.teams) return;
    for (int chunk = first; chunk < call.partials; chunk += step) {
        NF_UNROLL
        for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
            if (!slab.has(j)) continue;
            Value other;
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i)
                other.set(i, partial.load_coherent(partial_at<kWide>(call, slab.outer, slab.column0 + slab.column(j), chunk, i)));
            v[j].merge(other);
        }
    }
}

template <class T, bool kWide> NF_KERNEL(max_threads) moments_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Slab<T, kWide> slab(call.walk, block_index());
    Moments<A> m[kLanes];
    Vector<T> batch[moments_batch];
    collect<T, kWide, moments_batch>(call, slab, batch, m);
    over_sets<T, kWide>(call, slab, m, false);
    leave_partial<T, kWide>(call, slab, m);
    // Nobody reads the counter in this launch; the next one reads it already counted
    if (call.problem.scope == Scope::channel && call.tensors.counter && block_index() == 0 && thread_index() == 0)
        Global<int64_t>(call.tensors.counter).store(0, counted_batches(call) + 1);
}

}  // namespace normfused
