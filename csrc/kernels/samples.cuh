// Sets within sets: batch-instance norm has statistics of every sample beside those of the batch (rules/batch_instance.cuh).
//
// The walk is batch norm's, cut so that a team keeps to one sample (plan.h). So a thread's sums, and then its coefficients, are of one
// sample and channel (narrow: of one sample and the channels of its lanes), and the walks over x know nothing of it. The teams of a sample
// merge their sums first, which gives the sample's; then samples and blocks merge, which gives the batch's. Where a sample is cut into
// pieces (more blocks than samples), its values come from the blocks that hold them, in the same exchange.
#pragma once

#include "grad_apply.cuh"

namespace normfused {

// The sample that this thread's rows are of, and the chunks that hold it
template <class T, bool kWide> struct Sample {
    using A = AccumulatorOf<T>;
    static constexpr int kLanes = sum_lanes<T, kWide>, V = vector_size<T>;
    const Slab<T, kWide>& slab;
    int64_t n, channels;
    int pieces, first_chunk;
    bool live;

    NF_DEVICE Sample(const Call& call, const Slab<T, kWide>& slab_) : slab(slab_), channels(call.problem.C) {
        const Walk& w = call.walk;
        pieces = kWide ? w.vector_chunks : w.pieces;
        const int group = slab.chunk / pieces;  // of samples
        first_chunk = group * pieces;
        n = kWide ? slab.row0 + slab.row_lane() : int64_t(group) * w.samples + in_slab(w);
        live = slab.live && slab.row_lane() < slab.teams && n < call.problem.N;
    }
    NF_DEVICE int in_slab(const Walk& w) const { return kWide ? 0 : int(slab.before / w.sample_rows); }
    NF_DEVICE int64_t channel() const { return kWide ? slab.channel0 : slab.column0 + slab.column(0); }  // of lane 0
    NF_DEVICE int lanes() const { return !live ? 0 : kWide ? 1 : min_(slab.columns - slab.column(0), V); }
    NF_DEVICE bool speaks() const { return slab.chunk == first_chunk && (kWide ? slab.lane == 0 : slab.row_lane() == 0); }

    NF_DEVICE void load(const Parameter& p, A absent, A (&to)[kLanes]) const {
        if constexpr (kWide) to[0] = load_parameter(p, channel(), absent);
        else load_channels(p, channel(), 0, lanes(), absent, to);
    }
    // Of numbers per channel, the batch's first: of the batch, or (``own``) of the sample
    NF_DEVICE void load(const void* numbers, bool own, A (&to)[kLanes]) const {
        const Global<A> from(const_cast<void*>(numbers));
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) to[j] = j < lanes() ? from.load_coherent((own ? 1 + n : 0) * channels + channel() + j) : A(0);
    }
    NF_DEVICE void store(void* numbers, const A (&from)[kLanes]) const {
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j)
            if (j < lanes()) Global<A>(numbers).store((1 + n) * channels + channel() + j, from[j]);
    }
};

// ------------------------------------------------------------------------------------------------------ values of samples
// The threads' values -> ``v`` of the sample; gives the batch's
template <class T, class Value>
NF_DEVICE Value over_samples(const Call& call, const Slab<T, true>& slab, const Sample<T, true>& sample, Value (&v)[1]) {
    using A = AccumulatorOf<T>;
    v[0] = over_team<A>(v[0], slab.team, call.scratch_offset);
    const Value block = over_set<A>(slab.lane == 0 ? v[0] : Value(), int(block_threads()), call.scratch_offset);
    const WideExchange<T, Value> exchange(call, slab, block);
    if (sample.pieces > 1) v[0] = exchange.merged(sample.first_chunk, sample.first_chunk + sample.pieces);
    return exchange.merged();
}

// Rows of a table that lie 2*from, 4*from .. apart take up those between, below ``to``
template <class A, class Value> NF_DEVICE void merge_rows(const Table<A, Value>& table, int rows, int from, int to) {
    NF_NO_UNROLL
    for (int step = from; step < to; step *= 2) {
        NF_NO_UNROLL
        for (int i = int(thread_index()); i < (rows + 2 * step - 1) / (2 * step) * table.columns; i += int(block_threads())) {
            const int pair = i / table.columns, column = i - pair * table.columns, row = pair * 2 * step;
            if (row + step >= rows) continue;
            Value sum = table.get(row, column);
            sum.merge(table.get(row + step, column));
            table.set(row, column, sum);
        }
        sync_block();
    }
}

// The same of the columns of a narrow slab, whose two numbers on_set gives; ``v`` becomes the sample's
template <class T, class Value, class OnSet>
NF_DEVICE void over_samples(const Call& call, const Slab<T, false>& slab, const Sample<T, false>& sample, Value (&v)[vector_size<T>],
                            const OnSet& on_set, AccumulatorOf<T> (&first)[vector_size<T>], AccumulatorOf<T> (&second)[vector_size<T>]) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>;
    const Walk& w = call.walk;
    const int of_sample = w.rows_of_sample(), rows = w.samples * of_sample;
    const int threads = !w.folds ? w.team : w.samples > 1 ? min_(32, w.team * w.teams) : 32;  // to a row of the table
    const auto columns = [&](const auto& on_column) {
        if (w.folds) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) v[j] = over_lanes(v[j], threads, slab.team);
        }
        const Table<A, Value> table(call.scratch_offset, rows, slab.team * V);
        const int row = int(thread_index()) / threads;
        if (row < rows && int(thread_index()) - row * threads < slab.team) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) table.set(row, slab.column(j), v[j]);
        }
        sync_block();
        merge_rows(table, rows, 1, of_sample);
        NF_UNROLL
        for (int j = 0; j < V; ++j) v[j] = table.get(sample.in_slab(w) * of_sample, slab.column(j));
        if (w.samples > 1) sync_block();
        merge_rows(table, rows, of_sample, rows);
        for (int column = int(thread_index()); column < slab.columns; column += int(block_threads()))
            on_column(column, table.get(0, column));
    };
    over_owned_sets<true, T, Value>(call, slab, columns, [] {}, [](int, const Value&, bool) {}, on_set, first, second);
    if (sample.pieces == 1) return;
    const Table<A, Value> table(call.scratch_offset, 1, slab.team * V), mine = exchanged_columns<T, Value>(call, slab);
    for (int column = int(thread_index()); column < slab.columns; column += int(block_threads())) {
        const auto piece = [&](int chunk) {
            return call.owner == Owner::cluster ? mine.on_block(unsigned(chunk)).get(0, column)
                                                : ColumnValues<T, Value>(call, slab).get(column, chunk);
        };
        Value sum = piece(sample.first_chunk);
        NF_NO_UNROLL
        for (int i = 1; i < sample.pieces; ++i) sum.merge(piece(sample.first_chunk + i));
        table.set(0, column, sum);
    }
    sync_block();
    NF_UNROLL
    for (int j = 0; j < V; ++j) v[j] = slab.has(j) ? table.get(0, slab.column(j)) : Value();
    sync_block();  // the next slab's values take the table's place
}

// ------------------------------------------------------------------------------------------------------------ coefficients
// The statistics of the lanes' sample and channels -> coefficients, parameters included
template <class T, bool kWide, bool kRows>
NF_DEVICE void mix(const Call& call, const Sample<T, kWide>& sample, const AccumulatorOf<T> (&batch_mean)[sum_lanes<T, kWide>],
                   const AccumulatorOf<T> (&batch_rstd)[sum_lanes<T, kWide>], const AccumulatorOf<T> (&mean)[sum_lanes<T, kWide>],
                   const AccumulatorOf<T> (&rstd)[sum_lanes<T, kWide>], Coefficients<T, kWide, kRows>& c) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    A parameter[sum_lanes<T, kWide>];
    sample.load(t.rule_weight, A(0), parameter);
    NF_UNROLL
    for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
        const batch_instance::Mixture<A> m = batch_instance::mixture(parameter[j], batch_rstd[j], rstd[j], mean[j] - batch_mean[j]);
        c.mean[j] = mean[j];
        c.rstd[j] = m.scale;
        c.shift[j] = m.shift;
    }
    sample.load(t.weight, A(1), parameter);
    NF_UNROLL
    for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
        c.rstd[j] *= parameter[j];
        c.shift[j] *= parameter[j];
    }
    sample.load(t.bias, A(0), parameter);
    NF_UNROLL
    for (int j = 0; j < sum_lanes<T, kWide>; ++j) c.shift[j] += parameter[j];
    sample.load(t.act_weight, A(0), c.act_weight);
    if constexpr (kRows) c.at = 0;  // no row is of another channel
}

template <class T, bool kWide, bool kRows> NF_DEVICE void finish_samples(const Call& call, const Slab<T, kWide>& slab,
                                                                         Moments<AccumulatorOf<T>> (&m)[sum_lanes<T, kWide>],
                                                                         int64_t batches_before, Coefficients<T, kWide, kRows>& c) {
    using A = AccumulatorOf<T>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Sample<T, kWide> sample(call, slab);
    A batch_mean[kLanes], batch_rstd[kLanes], mean[kLanes], rstd[kLanes];
    const auto running = [&](int64_t set) { return needs_running(call) ? running_of<A>(call, set) : Running<A>(); };
    if constexpr (kWide) {
        const Moments<A> all = over_samples<T, Moments<A>>(call, slab, sample, m);
        const Statistics<A> s = finish_set(call, slab.outer, all, running(slab.outer), slab.chunk == 0 && slab.speaks(), batches_before);
        batch_mean[0] = s.mean;
        batch_rstd[0] = s.rstd;
    } else {
        const auto on_set = [&](int set, const Moments<A>& all, bool stores) {
            const int64_t channel = slab.first_set(call.walk) + set;
            const Statistics<A> s = finish_set(call, channel, all, running(channel), stores, batches_before);
            return Pair<A>{s.mean, s.rstd};
        };
        over_samples<T, Moments<A>>(call, slab, sample, m, on_set, batch_mean, batch_rstd);
    }
    const A per_position = A(1) / A(call.problem.S);
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) {
        mean[j] = m[j].mean();
        rstd[j] = standard::reciprocal_deviation(m[j].m2 * per_position, A(call.problem.eps));
    }
    if (sample.speaks()) {
        sample.store(call.tensors.mean, mean);
        sample.store(call.tensors.rstd, rstd);
    }
    mix(call, sample, batch_mean, batch_rstd, mean, rstd, c);
}

template <class T, bool kWide, bool kRows>
NF_DEVICE void saved_samples(const Call& call, const Slab<T, kWide>& slab, Coefficients<T, kWide, kRows>& c) {
    using A = AccumulatorOf<T>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Sample<T, kWide> sample(call, slab);
    A batch_mean[kLanes], batch_rstd[kLanes], mean[kLanes], rstd[kLanes];
    sample.load(call.tensors.mean, false, batch_mean);
    sample.load(call.tensors.rstd, false, batch_rstd);
    sample.load(call.tensors.mean, true, mean);
    sample.load(call.tensors.rstd, true, rstd);
    mix(call, sample, batch_mean, batch_rstd, mean, rstd, c);
}

// --------------------------------------------------------------------------------------------------------------- backward
// What threads, samples and blocks merge: sums of dz, of dz*(x - mean_c), of U, and of act_weight's gradient
enum : int { sample_dz = 0, sample_t = 1, sample_u = 2, sample_act = 3 };

// The sums of a channel over the batch -> q_c and r_c; ``stores``: and the gradients of its parameters
template <class A, int kSums>
NF_DEVICE Pair<A> finish_batch_gradient(const Call& call, int64_t channel, const Sums<A, kSums>& sums, bool stores) {
    const Arguments& t = call.tensors;
    const A weight = load_parameter(t.weight, channel, A(1)), gate = load_parameter(t.rule_weight, channel, A(0));
    const A rstd = Global<A>(t.rstd).load_coherent(channel), dz = sums.of[sample_dz], of_batch = rstd * sums.of[sample_t];
    if (stores && call.needs.parameters) {
        const A of_samples = sums.of[sample_u];
        store_parameter(t.dweight, channel, fma_(gate, of_batch, (A(1) - gate) * of_samples));
        store_parameter(t.dbias, channel, dz);
        store_parameter(t.drule_weight, channel, weight * (of_batch - of_samples));
        if constexpr (kSums > sample_act) store_act_gradient(call, channel, sums.of[sample_act]);
    }
    if (!call.problem.batch_statistics) return {A(0), A(0)};
    const Vjp<A> vjp = batch_instance::vjp_of_batch(weight, gate, rstd, of_batch, dz, A(call.per_element));
    return {vjp.q, vjp.r};
}

template <class T, bool kWide, bool kRows, int kSums>
NF_DEVICE void finish_sample_gradients(const Call& call, const Slab<T, kWide>& slab, Coefficients<T, kWide, kRows>& c,
                                       const Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>],
                                       GradientCoefficients<T, kWide>& g) {
    using A = AccumulatorOf<T>;
    using Value = Sums<A, kSums + 1>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Arguments& t = call.tensors;
    const Sample<T, kWide> sample(call, slab);
    A mean[kLanes], batch_mean[kLanes], rstd[kLanes];
    sample.load(t.mean, false, batch_mean);
    sample.load(t.rstd, true, rstd);
    Value v[kLanes];
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) {
        const A dz = sets[j].of[sum_dz], dz_xc = sets[j].of[sum_dz_xc];
        v[j].of[sample_dz] = dz;
        v[j].of[sample_t] = fma_(c.mean[j] - batch_mean[j], dz, dz_xc);
        v[j].of[sample_u] = rstd[j] * dz_xc;
        if constexpr (kSums > sum_act) v[j].of[sample_act] = sets[j].of[sum_act];
    }
    if constexpr (kWide) {
        const Value all = over_samples<T, Value>(call, slab, sample, v);
        const Pair<A> pair = finish_batch_gradient(call, slab.outer, all, slab.chunk == 0 && slab.speaks());
        g.q[0] = pair.first;
        g.r[0] = pair.second;
    } else {
        const auto on_set = [&](int set, const Value& all, bool stores) {
            return finish_batch_gradient(call, slab.first_set(call.walk) + set, all, stores);
        };
        over_samples<T, Value>(call, slab, sample, v, on_set, g.q, g.r);
    }
    // Read again, and the coefficients last: nothing of them need lie in registers while owners meet
    A gate[kLanes], weight[kLanes];
    sample.load(t.rule_weight, A(0), gate);
    sample.load(t.weight, A(1), weight);
    sample.load(t.mean, true, mean);
    sample.load(t.mean, false, batch_mean);
    sample.load(t.rstd, true, rstd);
    const A per_position = A(1) / A(call.problem.S);
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) {
        const Vjp<A> vjp = batch_instance::vjp(Vjp<A>{g.q[j], g.r[j]}, weight[j], gate[j], rstd[j], mean[j] - batch_mean[j],
                                               v[j].of[sample_u], v[j].of[sample_dz], per_position);
        g.q[j] = vjp.q;
        g.r[j] = vjp.r;
    }
    saved_samples<T, kWide, kRows>(call, slab, c);
}

}  // namespace normfused
