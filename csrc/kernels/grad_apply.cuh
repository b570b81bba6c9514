// Steps 2 and 3, backward: the sums of a set -> q, r (the rule's vjp);  dx = weight*rstd*dz + q*(x - mean) + r [+ dh], dresidual = dz.
//
// grad_apply_kernel (two_pass): a slab per block, whose sums are merged by every block that needs them from what grad_moments_kernel
// left; or q and r are given per (n, c); or zero, where the statistics were given. Reads dy and x (residual or mask, dh), writes dx
// (and dresidual); as a step also dshifted, which joins dy, and dresidual has the residual's factor. Channels that are sets (batch norm)
// get their parameters' gradients here, the others in grad_parameters.cuh.
#pragma once

#include "grad_moments.cuh"

namespace normfused {

// Lanes of q and r belong to sets. A set of one element (rms) has dx = weight*rstd*dz*q instead, with q = eps*rstd^2 and no r.
template <class T, bool kWide> struct GradientCoefficients {
    using A = AccumulatorOf<T>;
    static constexpr int kLanes = sum_lanes<T, kWide>;
    A q[kLanes] = {}, r[kLanes] = {};
};

// The sums of the slab's set that grad_moments_kernel left per row: of its channels, which the weights join here
template <class T, int kSums> NF_DEVICE Sums<AccumulatorOf<T>, kSums> gather_rows(const Call& call, const Slab<T, true>& slab) {
    using A = AccumulatorOf<T>;
    Sums<A, kSums> sums;
    const Global<A> dz(call.channel_sums[sum_dz]), dz_xc(call.channel_sums[sum_dz_xc]);
    const int64_t n = quotient(slab.outer, call.walk.period);
    const int rows = int(call.walk.rows), all = rows * int(call.partials);
    if (!slab.live || slab.row_lane() >= slab.teams) return sums;
    NF_NO_UNROLL
    for (int i = slab.row_lane() * slab.team + slab.lane; i < all; i += slab.team * slab.teams) {
        const int chunk = i / rows, channel = slab.channel0 + i - chunk * rows;
        const int64_t at = (chunk * call.problem.N + n) * call.problem.C + channel;
        const A weight = load_parameter(call.tensors.weight, channel, A(1));
        sums.of[sum_dz] = fma_(weight, dz.load_coherent(at), sums.of[sum_dz]);
        sums.of[sum_dz_xc] = fma_(weight, dz_xc.load_coherent(at), sums.of[sum_dz_xc]);
    }
    return sums;
}

template <class A> NF_DEVICE void store_act_gradient(const Call& call, int64_t channel, A sum) {
    if (call.channel_sums[sum_act]) Global<A>(call.channel_sums[sum_act]).store(channel, sum);  // one for all channels
    else store_parameter(call.tensors.dact_weight, channel, sum);
}

// Gradients of the parameters of one channel of one set, from sums that no weight has joined yet
template <class A, int kSums>
NF_DEVICE void finish_channel(const Call& call, int64_t n, int64_t channel, const Sums<A, kSums>& sums, A rstd) {
    const Arguments& t = call.tensors;
    if (!call.needs.parameters) return;
    if (call.problem.scope != Scope::channel) return store_channel_sums(call, n, channel, sums);
    store_parameter(t.dweight, channel, sums.of[sum_dz_xc] * rstd);
    store_parameter(t.dbias, channel, sums.of[sum_dz]);
    if constexpr (kSums > sum_act) store_act_gradient(call, channel, sums.of[sum_act]);
}

// A channel's gradients, if the sums are a channel's; then the weight joins them
template <class T, bool kWide, int kSums> NF_DEVICE void join_weight(const Call& call, const Slab<T, kWide>& slab, int64_t set,
                                                                     int64_t channel, bool stores, Sums<AccumulatorOf<T>, kSums>& sums) {
    using A = AccumulatorOf<T>;
    if (stores)
        finish_channel(call, quotient(slab.outer, call.walk.period), channel, sums, Global<A>(call.tensors.rstd).load_coherent(set));
    const A weight = load_parameter(call.tensors.weight, channel, A(1));
    sums.of[sum_dz] *= weight;
    sums.of[sum_dz_xc] *= weight;
}

template <class A, int kSums> NF_DEVICE Pair<A> finish_gradient(const Call& call, int64_t set, const Sums<A, kSums>& sums) {
    if (!call.problem.batch_statistics) return {A(0), A(0)};
    const A rstd = Global<A>(call.tensors.rstd).load_coherent(set), per_element = A(call.per_element);
    const A dz = sums.of[sum_dz], dz_xc = sums.of[sum_dz_xc];
    Vjp<A> vjp = {};
    switch (call.problem.rule) {
        case Rule::standard: vjp = standard::vjp(rstd, dz, dz_xc, per_element); break;
        case Rule::rms: vjp = call.count == 1 ? rms::vjp_of_one(rstd, eps_of<A>(call, set)) : rms::vjp(rstd, dz_xc, per_element); break;
        case Rule::mean_only: vjp = mean_only::vjp(dz, per_element); break;
        case Rule::batch_instance: break;  // samples.cuh
        case Rule::renorm: {
            const Global<A> saved(call.tensors.rstd);
            const renorm::Correction<A> c = {saved.load_coherent(renorm::saved_r * call.problem.C + set),
                                             saved.load_coherent(renorm::saved_d * call.problem.C + set)};
            vjp = renorm::vjp(rstd, c, dz, dz_xc, per_element);
        }
    }
    return {vjp.q, vjp.r};
}

// Sums that the threads hold, or (``gather``) that an earlier launch left, -> q and r of every lane's set; on the way, the gradients per
// channel where sums are a channel's
template <class T, bool kWide, bool kRows, int kSums>
NF_DEVICE void finish_gradients(const Call& call, const Slab<T, kWide>& slab, Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>],
                                bool gather, GradientCoefficients<T, kWide>& g) {
    using A = AccumulatorOf<T>;
    using Value = Sums<A, kSums>;
    const bool stores = slab.chunk == 0;
    if constexpr (kWide) {
        const bool of_channel = kRows && call.walk.one_channel;
        Value sums = over_wide_set(call, slab,
                                   !gather      ? sets[0]
                                   : of_channel ? gather_partials<T, Value>(call, slab)
                                                : gather_rows<T, kSums>(call, slab));
        if (!gather) sums = over_owners(call, slab, sums);
        if (!slab.live) return;
        if (of_channel) join_weight(call, slab, slab.outer, slab.channel0, stores && slab.speaks(), sums);
        const Pair<A> pair = finish_gradient(call, slab.outer, sums);
        g.q[0] = pair.first;
        g.r[0] = pair.second;
    } else {
        const auto on_column = [&](int column, Value& sums, bool stores) {
            if constexpr (!kRows) {
                const int64_t channel = slab.column0 + column;
                join_weight(call, slab, slab.outer * call.walk.sets_per_outer + quotient(channel, call.walk.width), channel, stores, sums);
            }
        };
        const auto on_set = [&](int set, const Value& sums) { return finish_gradient(call, slab.first_set(call.walk) + set, sums); };
        if (gather) {
            over_narrow_sets<T, Value>(
                call, slab, int(call.partials), partial_reader<T, Value>(call, slab),
                [&](int column, Value& sums) { on_column(column, sums, stores); }, on_set, g.q, g.r);
        } else {
            over_owned_sets<!kRows, T, Value>(
                call, slab, [&](const auto& give) { over_teams(call, slab, sets, give); }, [] {}, on_column,
                [&](int set, const Value& sums, bool) { return on_set(set, sums); }, g.q, g.r);
        }
    }
}

// What is asked for, in one register: each question is asked for every vector
struct GradientOutputs {
    int bits;
    NF_DEVICE explicit GradientOutputs(const Call& call)
        : bits(opaque((call.tensors.dx ? 1 : 0) | (call.tensors.dresidual ? 2 : 0) | (call.tensors.dh ? 4 : 0) |
                      (call.tensors.dz_scale ? 8 : 0) | (call.scales_by_q ? 16 : 0) | (call.streams ? 32 : 0))) {}
    NF_DEVICE bool dx() const { return bits & 1; }
    NF_DEVICE bool dresidual() const { return bits & 2; }
    NF_DEVICE bool dh() const { return bits & 4; }
    NF_DEVICE bool dz_scale() const { return bits & 8; }
    NF_DEVICE bool scales_by_q() const { return bits & 16; }
    NF_DEVICE bool streams() const { return bits & 32; }
};

template <class T, bool kWide, bool kRows, int kAct, class Batch, bool kRegular>
NF_DEVICE void grad_apply_vector(const Call& call, const Slab<T, kWide>& slab, const Spot<kRegular>& spot, Coefficients<T, kWide, kRows>& c,
                                 const GradientCoefficients<T, kWide>& g, const GradientOutputs& how, const Batch& batch, int k,
                                 const Vector<T>& dh) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, P = part_size<T, kAct>;
    const Arguments& t = call.tensors;
    if (spot.empty()) return;
    c.turn_to(call, slab, spot);
    Vector<T> dx, dresidual;
    NF_UNROLL
    for (int part = 0; part < V; part += P) {
        GradientLanes<A, P> lanes;
        gradient_lanes<T, kWide, kRows, kAct>(call, slab, spot, c, batch, k, part, lanes);
        if constexpr (Batch::of_step) {
            A of_residual[P];
            NF_UNROLL
            for (int j = 0; j < P; ++j) of_residual[j] = batch.residual_scale * lanes.dz[j];
            dresidual.set(part, of_residual);
        } else if (how.dresidual()) {
            dresidual.set(part, lanes.dz);
        }
        const auto q = [&](int j) { return g.q[kWide ? 0 : part + j]; };
        const auto r = [&](int j) { return g.r[kWide ? 0 : part + j]; };
        if (how.scales_by_q()) {
            NF_UNROLL
            for (int j = 0; j < P; ++j) lanes.dz[j] *= c.scale(part + j) * q(j);
        } else if (how.dz_scale()) {  // per (n, c), from cache: only rules written in PyTorch have one that is not ``scale``
            const Global<A> scales(const_cast<void*>(t.dz_scale));
            NF_UNROLL
            for (int j = 0; j < P; ++j) {
                const A scale = slab.has(part + j) ? scales.load_coherent(slab.set(call.walk, part + j)) : A(0);
                lanes.dz[j] = fma_(scale, lanes.dz[j], fma_(q(j), lanes.xc[j], r(j)));
            }
        } else {
            NF_UNROLL
            for (int j = 0; j < P; ++j) lanes.dz[j] = fma_(c.scale(part + j), lanes.dz[j], fma_(q(j), lanes.xc[j], r(j)));
        }
        if constexpr (kWide != kRows) {  // position sets: h = x + residual had a gradient of its own
            NF_UNROLL
            for (int j = 0; j < P; ++j) lanes.dz[j] += how.dh() ? dh.get(part + j) : A(0);
        }
        dx.set(part, lanes.dz);
    }
    const Cache cache = how.streams() ? Cache::evict_first : Cache::normal;
    if (how.dresidual()) slab.store(t.dresidual, spot, dresidual, cache);
    if (how.dx()) slab.store(t.dx, spot, dx, cache);
}

// The second pass of a backward over a slab, backwards
template <class T, bool kWide, bool kRows, int kAct, int K, class Batch>
NF_DEVICE void grad_apply_slab(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing, bool held, Batch& batch,
                               Coefficients<T, kWide, kRows>& c, const GradientCoefficients<T, kWide>& g) {
    const Arguments& t = call.tensors;
    if (!t.dx && !t.dresidual) return;
    const GradientStash<T, K> stash(batch.source, landing);
    const GradientOutputs how(call);
    auto cursor = slab.after((landing.last + 1) * K);
    NF_NO_UNROLL
    for (int b = landing.last; b >= 0; --b) {
        slab.template previous<K, kWide && kAct != any_act>(cursor, [&](const auto& cursors, const auto& spots) {
            if (!held || b < landing.last) {
                if (held && landing.stays(b)) stash.recall(b, spots, batch.source == z_of_mask, batch);
                else load_gradients<kAct>(call, slab, cursors, spots, batch);
            }
            Vector<T> dh[K];
            if (kWide != kRows && how.dh()) {
                NF_UNROLL
                for (int k = 0; k < K; ++k) dh[k] = slab.load(t.dh, spots[k]);
            }
            NF_UNROLL
            for (int k = K - 1; k >= 0; --k) grad_apply_vector<T, kWide, kRows, kAct>(call, slab, spots[k], c, g, how, batch, k, dh[k]);
        });
    }
}

template <class T, bool kWide, bool kRows, int kAct> NF_KERNEL(threads_of<kWide>) grad_apply_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    const Slab<T, kWide> slab(call.walk, block_index());
    Coefficients<T, kWide, kRows> c;
    GradientCoefficients<T, kWide> g;
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
        finish_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, slab, sets, true, g);
    }
    saved_statistics<T, kWide, kRows>(call, slab, c);
    c.renew(call, slab);
    StepBatch<T, gradient_batch> batch(call);
    grad_apply_slab<T, kWide, kRows, kAct>(call, slab, Landing<gradient_batch>(call, slab.steps), false, batch, c, g);
}

}  // namespace normfused
