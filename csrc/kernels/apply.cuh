// Step 3, forward: z = scale*(x - mean) + shift [+ residual],  y = act(z) [+ residual], with scale = weight*rstd, shift = bias.
//
// Per element a subtraction and one fma beside the activation (a*x + b would lose digits where the mean is large); the coefficients
// of a vector's channels and sets stay in registers from vector to vector. Reads x [and the residual] once, writes y [and the mask].
// The step for networks without norms also has a factor of the residual and a second output y + shift_after (StepEpilogue).
//
// apply_kernel (two_pass, evaluation, rules written in PyTorch): a slab per block. Its statistics are merged from the partials of
// moments_kernel by every block that needs them, or settled already, or the running ones; or scale and shift are given per (n, c).
#pragma once

#include "owners.cuh"

namespace normfused {

template <class A> NF_DEVICE A load_residual_scale(const Call& call) {
    const Global<A> factor(const_cast<void*>(call.tensors.residual_scale));
    return factor ? factor.load_coherent(0) : A(1);
}

// The numbers that z needs, for the lanes of one vector. Where lanes differ either in both their set and their channel or in neither,
// weight*rstd is one number; else it is multiplied out for every element, since one factor changes less often than the other.
template <class T, bool kWide, bool kRows> struct Coefficients {
    using A = AccumulatorOf<T>;
    static constexpr int V = vector_size<T>;
    static constexpr bool kJoined = kWide == kRows;
    static constexpr int kSets = kWide ? 1 : V;      // lanes with statistics of their own
    static constexpr int kChannels = kRows ? 1 : V;  // lanes with parameters of their own

    A mean[kSets], rstd[kSets];  // joined: weight*rstd once the channel is known
    A weight[kJoined ? 1 : kChannels] = {}, shift[kChannels] = {}, act_weight[kChannels] = {};
    A set_rstd = A(0);  // joined, along rows: the channel changes under the set
    int at = -1;        // what the parameters are of: the row, where channels run along rows, or the channel of lane 0

    NF_DEVICE A scale(int j) const { return kJoined ? rstd[kWide ? 0 : j] : rstd[kWide ? 0 : j] * weight[kRows ? 0 : j]; }
    NF_DEVICE A centred(A x, int j) const { return x - mean[kWide ? 0 : j]; }

    template <int W> NF_DEVICE void act_weights(int part, A (&to)[W]) const {
        NF_UNROLL
        for (int j = 0; j < W; ++j) to[j] = act_weight[W == 1 && kRows ? 0 : part + j];
    }

    // The statistics are those of another set. Narrow sets along columns: every thread keeps its columns, and gets their parameters here.
    NF_DEVICE void renew(const Call& call, const Slab<T, kWide>& slab) {
        if (call.tensors.scale) return;
        if constexpr (kWide && kRows) {
            set_rstd = rstd[0];
            at = -1;
        } else if constexpr (kJoined) {
            A w[V];
            const int first = slab.column0 + slab.column(0), last = slab.live ? min_(slab.columns - slab.column(0), V) : 0;
            load_channels(call.tensors.weight, first, 0, last, A(1), w);
            load_channels(call.tensors.bias, first, 0, last, A(0), shift);
            load_channels(call.tensors.act_weight, first, 0, last, A(0), act_weight);
            NF_UNROLL
            for (int j = 0; j < V; ++j) rstd[j] *= w[j];
        }
    }

    // Parameters of the channels of this vector, if it is not of the same as the one before
    template <bool kWideSlab, bool kRegular>
    NF_DEVICE void turn_to(const Call& call, const Slab<T, kWideSlab>& slab, const Spot<kRegular>& spot) {
        if constexpr (kWide || kRows) {
            int key = kRows ? spot.row & call.walk.row_key : slab.column0 + spot.column;
            if (key == at) return;
            at = key;
            const Arguments& t = call.tensors;
            if constexpr (kRows) {
                key = int(slab.row_channel(call.walk, spot.row));
                act_weight[0] = load_parameter(t.act_weight, key, A(0));
                if (opaque(t.scale != nullptr)) return;
                weight[0] = load_parameter(t.weight, key, A(1));
                if constexpr (kWide) rstd[0] = set_rstd * weight[0];
                shift[0] = load_parameter(t.bias, key, A(0));
            } else {
                load_channels(t.act_weight, key, spot.first, spot.last, A(0), act_weight);
                load_channels(t.bias, key, spot.first, spot.last, A(0), shift);
                load_channels(t.weight, key, spot.first, spot.last, A(1), weight);
            }
        }
    }

    // scale and shift are given per (n, c) (rules written in PyTorch): z = scale*x + shift, with x centred at ``mean`` if that is given
    NF_DEVICE void take_given(const Call& call, const Slab<T, kWide>& slab) {
        if constexpr (kJoined) {
            const Arguments& t = call.tensors;
            const Global<A> scales(const_cast<void*>(t.scale)), shifts(const_cast<void*>(t.shift)), means(t.mean);
            NF_UNROLL
            for (int j = 0; j < kSets; ++j) {
                const bool there = slab.has(j);
                const int64_t set = there ? slab.set(call.walk, j) : 0;
                mean[j] = there && means ? means.load_coherent(set) : A(0);
                rstd[j] = there ? scales.load_coherent(set) : A(0);
                shift[j] = there ? fma_(rstd[j], mean[j], shifts.load_coherent(set)) : A(0);
            }
            if constexpr (!kRows)
                load_channels(t.act_weight, slab.column0 + slab.column(0), 0, min_(slab.columns - slab.column(0), V), A(0), act_weight);
        }
    }
};

// Moments that the threads hold, or (``gather``) that an earlier launch left, -> statistics of the sets, stored once and for every lane.
// Lanes beyond the tensor get zeros.
template <class T, bool kWide, bool kRows> NF_DEVICE void finish_sets(const Call& call, const Slab<T, kWide>& slab,
                                                                      Moments<AccumulatorOf<T>> (&m)[sum_lanes<T, kWide>], bool gather,
                                                                      int64_t batches_before, Coefficients<T, kWide, kRows>& c) {
    using A = AccumulatorOf<T>;
    const bool stores = slab.chunk == 0;  // of all slabs that know the set
    const bool with_running = needs_running(call);
    if constexpr (kWide) {
        const Running<A> running = with_running && slab.live ? running_of<A>(call, slab.outer) : Running<A>();
        Moments<A> sum = over_wide_set(call, slab, gather ? gather_partials<T, Moments<A>>(call, slab) : m[0]);
        if (!gather) sum = over_owners(call, slab, sum);
        if (with_running) sync_block();  // small sets meet by shuffles alone, which order no memory
        c.mean[0] = c.rstd[0] = A(0);
        if (slab.live) {
            const Statistics<A> s = finish_set(call, slab.outer, sum, running, stores && slab.speaks(), batches_before);
            c.mean[0] = s.mean;
            c.rstd[0] = s.rstd;
        }
    } else {
        const SetNumbers<T> numbers(call, slab);  // hold the running statistics until the sets' own take their places
        const auto before = [&] {
            if (!with_running) return;
            for (int set = int(thread_index()); set < slab.sets(call.walk); set += int(block_threads())) {
                const Running<A> running = running_of<A>(call, slab.first_set(call.walk) + set);
                numbers.leave(set, {running.mean, running.deviation});
            }
        };
        const auto on_set = [&](int set, const Moments<A>& sum, bool stores) {
            const Pair<A> running = with_running ? numbers.get(set) : Pair<A>();
            const Statistics<A> s =
                finish_set(call, slab.first_set(call.walk) + set, sum, {running.first, running.second}, stores, batches_before);
            return Pair<A>{s.mean, s.rstd};
        };
        if (gather) {
            over_narrow_sets<T, Moments<A>>(
                call, slab, int(call.partials), partial_reader<T, Moments<A>>(call, slab), [](int, const Moments<A>&) {},
                [&](int set, const Moments<A>& sum) { return on_set(set, sum, stores); }, c.mean, c.rstd);
        } else {
            over_owned_sets<!kRows, T, Moments<A>>(
                call, slab, [&](const auto& on_column) { over_teams(call, slab, m, on_column); }, before,
                [](int, const Moments<A>&, bool) {}, on_set, c.mean, c.rstd);
        }
    }
}

// Statistics that an earlier launch saved, for the lanes of this thread
template <class T, bool kWide, bool kRows>
NF_DEVICE void saved_statistics(const Call& call, const Slab<T, kWide>& slab, Coefficients<T, kWide, kRows>& c) {
    using A = AccumulatorOf<T>;
    const Arguments& t = call.tensors;
    if (t.scale) return c.take_given(call, slab);
    const Global<A> means(t.mean), rstds(t.rstd);
    NF_UNROLL
    for (int j = 0; j < sum_lanes<T, kWide>; ++j) {
        const bool there = slab.has(j);
        const int64_t set = there ? slab.set(call.walk, j) : 0;
        c.mean[j] = there && means ? means.load_coherent(set) : A(0);
        c.rstd[j] = there ? rstds.load_coherent(set) : A(0);
    }
}

// What follows the affine map in kernels of whole norms ...
struct NormEpilogue {
    static constexpr bool shifts = false;
    template <class A> NF_DEVICE A join(A z, A residual) const { return z + residual; }
};

// ... and in the kernel of the step, where the residual has a factor and y + shift_after is an output too (or the only one)
template <class T, bool kWide> struct StepEpilogue {
    using A = AccumulatorOf<T>;
    static constexpr bool shifts = true;
    A residual_scale, shift_after[kWide ? 1 : vector_size<T>];

    NF_DEVICE StepEpilogue(const Call& call, const Slab<T, kWide>& slab) : residual_scale(load_residual_scale<A>(call)) {
        const Global<A> shifts_after(const_cast<void*>(call.tensors.shift_after));
        NF_UNROLL
        for (int j = 0; j < (kWide ? 1 : vector_size<T>); ++j)
            shift_after[j] = shifts_after && slab.has(j) ? shifts_after.load_coherent(slab.set(call.walk, j)) : A(0);
    }
    NF_DEVICE A join(A z, A residual) const { return fma_(residual_scale, residual, z); }
};

// What is asked for, in one register: each question is asked for every vector
struct Outputs {
    int bits;
    NF_DEVICE explicit Outputs(const Call& call)
        : bits(opaque(int(call.problem.residual_mode) | (call.tensors.mask ? 8 : 0) | (call.tensors.y ? 16 : 0) |
                      (call.tensors.shifted ? 32 : 0) | (call.streams ? 64 : 0))) {}
    NF_DEVICE ResidualMode residual_mode() const { return ResidualMode(bits & 7); }
    NF_DEVICE bool adds() const { return residual_mode() == ResidualMode::pre_act || residual_mode() == ResidualMode::post_act; }
    NF_DEVICE bool mask() const { return bits & 8; }
    NF_DEVICE bool y() const { return bits & 16; }
    NF_DEVICE bool shifted() const { return bits & 32; }
    NF_DEVICE Cache cache() const { return bits & 64 ? Cache::evict_first : Cache::normal; }
};

template <class T, bool kWide, bool kRows, int kAct, class Epilogue, bool kRegular>
NF_DEVICE void apply_vector(const Call& call, const Slab<T, kWide>& slab, const typename Slab<T, kWide>::Cursor& cursor,
                            const Spot<kRegular>& spot, Coefficients<T, kWide, kRows>& c, const Epilogue& epilogue, const Outputs& how,
                            const Vector<T>& x, const Vector<T>& residual) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, P = part_size<T, kAct>;
    const Arguments& t = call.tensors;
    const Activation<kAct, A, P> act(call);
    if (spot.empty()) {  // a ragged row may touch fewer vectors than its neighbours; no byte of the mask stays unwritten
        if (!kRegular && how.mask() && slab.has(cursor)) Global<uint8_t>(t.mask).store(slab.mask_at(call.walk, cursor), uint8_t(0));
        return;
    }
    c.turn_to(call, slab, spot);
    Vector<T> y, shifted;
    unsigned bits = 0;
    NF_UNROLL
    for (int part = 0; part < V; part += P) {
        A z[P], weight[kRows ? 1 : P];
        c.act_weights(part, weight);
        NF_UNROLL
        for (int j = 0; j < P; ++j) z[j] = fma_(c.scale(part + j), c.centred(x.get(part + j), part + j), c.shift[kRows ? 0 : part + j]);
        if (how.residual_mode() == ResidualMode::pre_act) {
            NF_UNROLL
            for (int j = 0; j < P; ++j) z[j] = epilogue.join(z[j], residual.get(part + j));
            if (how.mask()) {
                bits |= act.bits(z, weight) << part;
                if (part + P == V) Global<uint8_t>(t.mask).store(slab.mask_at(call.walk, cursor), uint8_t(bits));
            }
        }
        act.forward(z, weight);
        if (how.residual_mode() == ResidualMode::post_act) {
            NF_UNROLL
            for (int j = 0; j < P; ++j) z[j] += residual.get(part + j);
        }
        y.set(part, z);
        if constexpr (Epilogue::shifts) {
            if (!how.shifted()) continue;
            NF_UNROLL
            for (int j = 0; j < P; ++j) z[j] += epilogue.shift_after[kWide ? 0 : part + j];
            shifted.set(part, z);
        }
    }
    if constexpr (Epilogue::shifts) {
        if (how.shifted()) slab.store(t.shifted, spot, shifted);
        if (!how.y()) return;
    }
    slab.store(t.y, spot, y, how.cache());
}

// The second pass over a slab, backwards. ``held``: the first pass was in this kernel and left the last batch in registers.
template <class T, bool kWide, bool kRows, int kAct, int K, class Epilogue>
NF_DEVICE void apply_slab(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing, bool held, Vector<T> (&batch)[K],
                          Coefficients<T, kWide, kRows>& c, const Epilogue& epilogue) {
    const Arguments& t = call.tensors;
    const Outputs how(call);
    const bool of_h = call.problem.residual_mode == ResidualMode::pre_norm;
    const void* source = of_h ? t.h : t.x;
    auto cursor = slab.after((landing.last + 1) * K);
    NF_NO_UNROLL
    for (int b = landing.last; b >= 0; --b) {
        slab.template previous<K, true>(cursor, [&](const auto& cursors, const auto& spots) {
            recall(slab, landing, held, b, spots, source, kWide != kRows && of_h, batch);
            Vector<T> residual[K];
            if (how.adds()) {
                NF_UNROLL
                for (int k = 0; k < K; ++k) residual[k] = slab.load(t.residual, spots[k]);
            }
            NF_UNROLL
            for (int k = K - 1; k >= 0; --k)
                apply_vector<T, kWide, kRows, kAct>(call, slab, cursors[k], spots[k], c, epilogue, how, batch[k], residual[k]);
        });
    }
}

template <class T, bool kWide, bool kRows, int kAct> NF_KERNEL(threads_of<kWide>) apply_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    constexpr int kLanes = sum_lanes<T, kWide>;
    const Slab<T, kWide> slab(call.walk, block_index());
    const Arguments& t = call.tensors;
    Coefficients<T, kWide, kRows> c;
    if (t.scale || call.settled) {
        saved_statistics<T, kWide, kRows>(call, slab, c);
    } else if (call.problem.batch_statistics) {
        Moments<A> none[kLanes];
        finish_sets<T, kWide, kRows>(call, slab, none, true, counted_batches(call) - 1, c);  // moments_kernel has counted this batch
    } else {  // running statistics, per channel; their copies are for the backward, which must not see later updates
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) {
            const bool there = slab.has(j);
            const int64_t channel = there ? slab.set(call.walk, j) : 0;
            c.mean[j] = there ? load_parameter(t.running_mean, channel, A(0)) : A(0);
            c.rstd[j] = there ? standard::reciprocal_deviation(load_parameter(t.running_var, channel, A(1)), A(call.problem.eps)) : A(0);
            if (there && slab.chunk == 0 && slab.speaks()) {
                Global<A>(t.mean).store(channel, c.mean[j]);
                Global<A>(t.rstd).store(channel, c.rstd[j]);
            }
        }
    }
    c.renew(call, slab);
    Vector<T> batch[forward_batch];
    const StepEpilogue<T, kWide> epilogue(call, slab);
    apply_slab<T, kWide, kRows, kAct>(call, slab, Landing<forward_batch>(call, slab.steps), false, batch, c, epilogue);
}

}  // namespace normfused
