// Steps 2 and 3, backward: the sums of a set -> q, r (the rule's vjp);  dx = weight*rstd*dz + q*(x - mean) + r [+ dh], dresidual = dz.
//
// grad_apply_kernel (two_pass): a slab per block, whose sums are merged by every block that needs them from what grad_moments_kernel
// left; or q and r are given per (n, c); or zero, where the statistics were given. Reads dy and x (residual or mask, dh), writes dx
// (and dresidual). Channels that are sets (batch norm) get their parameters' gradients here, the others in grad_parameters.cuh.
#pragma once

#include "grad_moments.cuh"

namespace normfused {

// Lanes of q and r belong to sets. A set of one element (rms) has dx = weight*rstd*dz*q instead, with q = eps*rstd^2 and no r.
template <class T, bool kWide> struct GradientCoefficients {
    using A = AccumulatorOf<T>;
    static constexpr int kLanes = sum_lanes<T, kWide>;
    A q[kLanes] = {}, r[kLanes] = {};
};

// The sums of the slab's sets that grad_moments_kernel left: of rows' channels already weighted, else per channel
template <class T, bool kWide, bool kRows, int kSums>
NF_DEVICE void gather_gradients(const Call& call, const Slab<T, kWide>& slab, Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>]) {
    using A = AccumulatorOf<T>;
    if (!kWide || call.walk.one_channel) return gather_partials<T, kWide>(call, slab, sets);
    const Global<A> dz(call.channel_sums[sum_dz]), dz_xc(call.channel_sums[sum_dz_xc]);
    const int64_t n = quotient(slab.outer, call.walk.period), vector_chunks = call.partials, rows = call.walk.rows;
    if (!slab.live || slab.row_lane >= slab.teams) return;
    const int64_t threads = slab.team * slab.teams;
    for (int64_t i = slab.row_lane * slab.team + slab.lane; i < rows * vector_chunks; i += threads) {
        const int64_t chunk = quotient(i, rows), channel = slab.channel0 + i - chunk * rows;
        const int64_t at = (chunk * call.problem.N + n) * call.problem.C + channel;
        const A weight = load_parameter(call.tensors.weight, channel, A(1));
        sets[0].of[sum_dz] = fma_(weight, dz.load_coherent(at), sets[0].of[sum_dz]);
        sets[0].of[sum_dz_xc] = fma_(weight, dz_xc.load_coherent(at), sets[0].of[sum_dz_xc]);
    }
}

// Gradients of the parameters of one channel of one set, from sums that no weight has joined yet
template <class A, int kSums> NF_DEVICE void finish_channel(const Call& call, int64_t n, int64_t channel, const Sums<A, kSums>& sums, A rstd) {
    const Arguments& t = call.tensors;
    if (!call.needs.parameters) return;
    if (call.problem.scope != Scope::channel) return store_channel_sums(call, n, channel, sums);
    store_parameter(t.dweight, channel, sums.of[sum_dz_xc] * rstd);
    store_parameter(t.dbias, channel, sums.of[sum_dz]);
    if constexpr (kSums < 3) return;
    else if (call.channel_sums[sum_act]) Global<A>(call.channel_sums[sum_act]).store(channel, sums.of[sum_act]);  // one for all channels
    else store_parameter(t.dact_weight, channel, sums.of[sum_act]);
}

// Sums of threads -> q and r of every lane's set; on the way, the gradients per channel where a thread's sums are a channel's
template <class T, bool kWide, bool kRows, int kSums>
NF_DEVICE void finish_gradients(const Call& call, const Slab<T, kWide>& slab, bool first_chunk, Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>], GradientCoefficients<T, kWide>& g) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, kLanes = sum_lanes<T, kWide>;
    over_sets<T, kWide>(call, slab, sets, false);
    const bool channel_is_known = kWide ? kRows && call.walk.one_channel : !kRows;
    if (channel_is_known) {
        const bool writer = first_chunk && slab.speaks();
        const int64_t n = quotient(slab.outer, call.walk.period);
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) {
            if (!slab.has(j)) continue;
            const int64_t channel = kWide ? slab.channel0 : slab.column0 + slab.column(j);
            if (writer) finish_channel(call, n, channel, sets[j], Global<A>(call.tensors.rstd).load_coherent(slab.set(call.walk, j)));
            const A weight = load_parameter(call.tensors.weight, channel, A(1));
            sets[j].of[sum_dz] *= weight;
            sets[j].of[sum_dz_xc] *= weight;
        }
    }
    if constexpr (!kWide) over_columns<A, V>(sets, int(call.walk.width), slab.columns, slab.lane, slab.row_lane == 0, call.columns_offset);
    if (!call.problem.batch_statistics) return;
    const A count = A(call.count);
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) {
        if (!slab.has(j)) continue;
        const int64_t set = slab.set(call.walk, j);
        const A rstd = Global<A>(call.tensors.rstd).load_coherent(set);
        const Vjp<A> vjp = call.problem.centred ? standard::vjp(rstd, sets[j].of[sum_dz], sets[j].of[sum_dz_xc], count)
                           : call.count == 1    ? rms::vjp_of_one(rstd, eps_of<A>(call, set))
                                                : rms::vjp(rstd, sets[j].of[sum_dz_xc], count);
        g.q[j] = vjp.q;
        g.r[j] = vjp.r;
    }
}

template <class T, bool kWide, bool kRows>
NF_DEVICE void grad_apply_vector(const Call& call, const Slab<T, kWide>& slab, const Spot& spot, const Coefficients<T, kWide, kRows>& c,
                                 const GradientCoefficients<T, kWide>& g, GradientLanes<AccumulatorOf<T>, vector_size<T>>& lanes, const Vector<T>& dh) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>;
    const Arguments& t = call.tensors;
    if (spot.empty()) return;
    if (t.dresidual) slab.store(t.dresidual, spot, pack<T>(lanes.dz));
    if (!t.dx) return;
    A add[V];
    unpack<T>(dh, add);
    if (call.scales_by_q) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) lanes.dz[j] *= c.scale(j) * g.q[kWide ? 0 : j];
    } else if (t.dz_scale) {  // per (n, c), from cache: only rules written in PyTorch have one that is not ``scale``
        const Global<A> scales(const_cast<void*>(t.dz_scale));
        NF_UNROLL
        for (int j = 0; j < V; ++j) {
            const A scale = slab.has(j) ? scales.load_coherent(slab.set(call.walk, j)) : A(0);
            lanes.dz[j] = fma_(scale, lanes.dz[j], fma_(g.q[kWide ? 0 : j], lanes.xc[j], g.r[kWide ? 0 : j]));
        }
    } else {
        NF_UNROLL
        for (int j = 0; j < V; ++j) lanes.dz[j] = fma_(c.scale(j), lanes.dz[j], fma_(g.q[kWide ? 0 : j], lanes.xc[j], g.r[kWide ? 0 : j]));
    }
    if (t.dh) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) lanes.dz[j] += add[j];
    }
    slab.store(t.dx, spot, pack<T>(lanes.dz));
}

// The second pass of a backward over a slab, backwards
template <class T, bool kWide, bool kRows, int kAct, int K>
NF_DEVICE void grad_apply_slab(const Call& call, const Slab<T, kWide>& slab, bool held, GradientBatch<T, K>& batch, Coefficients<T, kWide, kRows>& c,
                               const GradientCoefficients<T, kWide>& g) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    if (!t.dx && !t.dresidual) return;
    const Activation<kAct, A, vector_size<T>> act(call.problem);
    const GradientStash<T, K> stash(call);
    const int batches = (slab.steps + K - 1) / K;
    auto cursor = slab.after(batches * K);
    for (int b = batches - 1; b >= 0; --b) {
        typename Slab<T, kWide>::Cursor cursors[K];
        Spot spots[K];
        NF_UNROLL
        for (int k = K - 1; k >= 0; --k) {
            slab.retreat(cursor);
            cursors[k] = cursor;
            spots[k] = slab.spot(cursor);
        }
        if (!held || b + 1 < batches) {
            const int kept = b - (batches - 1 - stash.resident);
            if (held && kept >= 0) stash.recall(kept, batch);
            else load_gradients<T, kWide, K>(call, slab, cursors, spots, batch);
        }
        Vector<T> dh[K] = {};
        if (t.dh) {
            NF_UNROLL
            for (int k = 0; k < K; ++k) dh[k] = slab.load(t.dh, spots[k]);
        }
        NF_UNROLL
        for (int k = K - 1; k >= 0; --k) {
            c.turn_to(call, slab, spots[k]);
            GradientLanes<A, vector_size<T>> lanes;
            gradient_lanes<T, kWide, kRows, kAct, K>(call, c, act, batch, k, lanes);
            grad_apply_vector<T, kWide, kRows>(call, slab, spots[k], c, g, lanes, dh[k]);
        }
    }
}

template <class T, bool kWide, bool kRows, int kAct> NF_KERNEL(max_threads) grad_apply_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    const Slab<T, kWide> slab(call.walk, block_index());
    Coefficients<T, kWide, kRows> c;
    GradientCoefficients<T, kWide> g;
    saved_statistics<T, kWide, kRows>(call, slab, c);
    if (t.q) {  // of slices, or settled per set
        const Global<A> qs(const_cast<void*>(t.q)), rs(const_cast<void*>(t.r));
        NF_UNROLL
        for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
            if (!slab.has(j)) continue;
            g.q[j] = qs.load_coherent(slab.set(call.walk, j));
            g.r[j] = rs.load_coherent(slab.set(call.walk, j));
        }
    } else if (call.partials) {
        Sums<A, gradient_sums<kAct>> sets[sum_lanes<T, kWide>];
        gather_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, slab, sets);
        finish_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, slab, slab.chunk == 0, sets, g);
    }
    GradientBatch<T, gradient_batch> batch;
    grad_apply_slab<T, kWide, kRows, kAct, gradient_batch>(call, slab, false, batch, c, g);
}

}  // namespace normfused
