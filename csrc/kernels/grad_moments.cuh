// Step 1, backward: dz = dy*act'(z), z recomputed from x (and the residual) or replaced by the mask; then the sums of dz, of
// dz*(x - mean) and of the gradient of act_weight. Sums are centred, and always added in the same order.
//
// Along rows (NCHW), a row is of one channel: a thread sums its part of a row, and at the row's end the weighted sums join those of
// the set, the plain ones those of the channel. Along columns (NHWC) every lane sums its own channel; the weights join at the end.
// In position sets the weight varies inside the set: every element is weighted, and channels are summed over sets, in shared memory.
//
// grad_moments_kernel (two_pass): a slab per block. Leaves for the next launch, per channel of a sample where a set has several
//     channels along rows: channel_sums [quantity][vector chunk, n][C]; else ``partial`` as moments.cuh, with three sums.
// Reads dy and x (and the residual or mask) once; writes nothing of that size.
#pragma once

#include "apply.cuh"

namespace normfused {

enum : int { sum_dz = 0, sum_dz_xc = 1, sum_act = 2 };

// Activations with a parameter of their own are among those that share an instantiation
template <int kAct> constexpr int gradient_sums = kAct == any_act ? 3 : 2;

// What z comes from, beside x
enum : int { z_of_x = 0, z_of_residual = 1, z_of_mask = 2 };

template <class T, int K> struct GradientBatch {
    static constexpr bool of_step = false;
    int source;
    Vector<T> x[K], dy[K], residual[K];
    uint8_t bits[K];

    NF_DEVICE explicit GradientBatch(int source_) : source(source_) {}
    NF_DEVICE explicit GradientBatch(const Call& call)
        : source(opaque(call.tensors.mask       ? z_of_mask
                        : call.tensors.residual ? z_of_residual
                                                : z_of_x)) {}
};

// In the kernels of the steps: the output y + shift_after had a gradient too, and the residual has a factor (StepEpilogue)
template <class T, int K> struct StepBatch : GradientBatch<T, K> {
    static constexpr bool of_step = true;
    Vector<T> dshifted[K];
    AccumulatorOf<T> residual_scale;

    NF_DEVICE explicit StepBatch(const Call& call)
        : GradientBatch<T, K>(call), residual_scale(load_residual_scale<AccumulatorOf<T>>(call)) {}
};

template <class A, int P> struct GradientLanes {  // of a part of a vector
    A xc[P], dz[P], dact[P];
};

// Whether vectors at the ends of rows are read whole, and their other lanes cleared for the sums. The instantiation that activations share
// has no register to spare for it: there the ends are read element by element.
template <int kAct> constexpr bool clears_outside = kAct != any_act;

// Reads a batch; what the call has none of stays as it is and is not used
template <int kAct, class T, bool kWide, int K, bool kRegular, class Batch>
NF_DEVICE void load_gradients(const Call& call, const Slab<T, kWide>& slab, const typename Slab<T, kWide>::Cursor (&cursors)[K],
                              const Spot<kRegular> (&spots)[K], Batch& batch) {
    const Arguments& t = call.tensors;
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        batch.x[k] = slab.template load<false, clears_outside<kAct>>(t.x, spots[k]);
        batch.dy[k] = slab.template load<false, clears_outside<kAct>>(t.dy, spots[k]);
    }
    const void* residual = t.residual;
    bool with_residual = batch.source == z_of_residual;
    if constexpr (Batch::of_step) {
        if (t.against) residual = t.against, with_residual = true;
        if (clears_outside<kAct> && t.dshifted) {
            NF_UNROLL
            for (int k = 0; k < K; ++k) batch.dshifted[k] = slab.load(t.dshifted, spots[k]);
        }
    }
    if (with_residual) {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch.residual[k] = slab.template load<false, clears_outside<kAct>>(residual, spots[k]);
    }
    if (batch.source == z_of_mask) {
        NF_UNROLL
        for (int k = 0; k < K; ++k)
            batch.bits[k] = !spots[k].empty() ? Global<const uint8_t>(t.mask).load(slab.mask_at(call.walk, cursors[k])) : uint8_t(0);
    }
}

template <class T, bool kWide, bool kRows, int kAct, class AnySlab, bool kRegular, class Batch>
NF_DEVICE void gradient_lanes(const Call& call, const AnySlab& slab, const Spot<kRegular>& spot, const Coefficients<T, kWide, kRows>& c,
                              const Batch& batch, int k, int part, GradientLanes<AccumulatorOf<T>, part_size<T, kAct>>& lanes) {
    using A = AccumulatorOf<T>;
    constexpr int P = part_size<T, kAct>;
    const Activation<kAct, A, P> act(call);
    A z[P], weight[kRows ? 1 : P];
    c.act_weights(part, weight);
    NF_UNROLL
    for (int j = 0; j < P; ++j) {
        lanes.xc[j] = c.centred(batch.x[k].get(part + j), part + j);
        lanes.dz[j] = batch.dy[k].get(part + j);
        lanes.dact[j] = A(0);
        z[j] = fma_(c.scale(part + j), lanes.xc[j], c.shift[kRows ? 0 : part + j]);
    }
    if constexpr (Batch::of_step) {
        if (opaque(int(call.tensors.dshifted != nullptr))) {
            if constexpr (clears_outside<kAct>) {
                NF_UNROLL
                for (int j = 0; j < P; ++j) lanes.dz[j] += batch.dshifted[k].get(part + j);
            } else {  // no registers for another vector
                const Pack<T, P> dshifted = slab.template load_part<P>(call.tensors.dshifted, spot, part);
                NF_UNROLL
                for (int j = 0; j < P; ++j) lanes.dz[j] += widen(dshifted.data[j]);
            }
        }
    }
    if (batch.source == z_of_mask) return act.from_bits(lanes.dz, unsigned(batch.bits[k]) >> part, lanes.dact);
    if (batch.source == z_of_residual) {
        NF_UNROLL
        for (int j = 0; j < P; ++j) {
            const A residual = batch.residual[k].get(part + j);
            if constexpr (Batch::of_step) z[j] = fma_(batch.residual_scale, residual, z[j]);
            else z[j] += residual;
        }
    }
    act.backward(lanes.dz, z, weight, lanes.dact);
}

template <class A, int kSums>
NF_DEVICE void store_channel_sums(const Call& call, int64_t entry, int64_t channel, const Sums<A, kSums>& sums) {
    NF_UNROLL
    for (int i = 0; i < kSums; ++i)
        if (call.channel_sums[i]) Global<A>(call.channel_sums[i]).store(entry * call.problem.C + channel, sums.of[i]);
}

// Sums per channel that a block keeps in shared memory over its position sets: [quantity][group][C], groups of threads with sets of
// their own (wide). A slot has one owner, so nothing need be ordered until the block has done.
template <class T, bool kWide, int kSums> struct ChannelSums {
    using A = AccumulatorOf<T>;
    static constexpr int V = vector_size<T>;
    int groups, columns, offset;

    NF_DEVICE ChannelSums(const Call& call)
        : groups(kWide ? call.walk.sets_per_block : 1),
          columns(int(kWide ? call.walk.row_vectors * V : call.walk.rows)),
          offset(call.sums_offset) {}
    NF_DEVICE Shared<A> all() const { return shared_at<A>(offset, kSums * groups * columns); }
    NF_DEVICE int slot(int quantity, int group, int column) const { return (quantity * groups + group) * columns + column; }

    NF_DEVICE void clear() const {
        for (int i = int(thread_index()); i < kSums * groups * columns; i += int(block_threads())) all().set(i, A(0));
        sync_block();
    }
    template <int P> NF_DEVICE void add_lanes(int quantity, int group, int column, const A (&v)[P]) const {
        Pack<A, P> sum = all().template load<P>(slot(quantity, group, column));
        NF_UNROLL
        for (int j = 0; j < P; ++j) sum.data[j] += v[j];
        all().template store<P>(slot(quantity, group, column), sum);
    }
    NF_DEVICE void add_row(int row, const Sums<A, kSums>& sums) const {
        NF_UNROLL
        for (int i = 0; i < kSums; ++i) all().set(slot(i, 0, row), all().get(slot(i, 0, row)) + sums.of[i]);
    }
    NF_DEVICE void leave(const Call& call, int64_t entry) const {
        sync_block();
        for (int c = int(thread_index()); c < int(call.problem.C); c += int(block_threads())) {
            Sums<A, kSums> sums;
            for (int group = 0; group < groups; ++group) {
                NF_UNROLL
                for (int i = 0; i < kSums; ++i) sums.of[i] += all().get(slot(i, group, c));
            }
            store_channel_sums(call, entry, c, sums);
        }
    }
};

// Adds a part of a vector to the sums of its sets, its row (along rows) or its channels (position sets along columns)
template <class T, bool kWide, bool kRows, int kSums, int P, bool kRegular>
NF_DEVICE void add_gradients(const Call& call, const Coefficients<T, kWide, kRows>& c, const GradientLanes<AccumulatorOf<T>, P>& lanes,
                             int part, const Slab<T, kWide>& slab, const Spot<kRegular>& spot,
                             Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>], Sums<AccumulatorOf<T>, kSums>& row) {
    using A = AccumulatorOf<T>;
    const auto add = [](Sums<A, kSums>& to, A dz, A xc, A dact) {
        to.of[sum_dz] += dz;
        to.of[sum_dz_xc] = fma_(dz, xc, to.of[sum_dz_xc]);
        if constexpr (kSums == 3) to.of[sum_act] += dact;
    };
    if constexpr (kWide == kRows) {
        NF_UNROLL
        for (int j = 0; j < P; ++j) add(kWide ? row : sets[kWide ? 0 : part + j], lanes.dz[j], lanes.xc[j], lanes.dact[j]);
    } else {
        NF_UNROLL
        for (int j = 0; j < P; ++j) add(sets[kWide ? 0 : part + j], lanes.dz[j] * c.weight[kRows ? 0 : part + j], lanes.xc[j], A(0));
        if constexpr (kRows) {
            NF_UNROLL
            for (int j = 0; j < P; ++j) add(row, lanes.dz[j], lanes.xc[j] * c.rstd[part + j], lanes.dact[j]);
        } else if (call.sums_offset >= 0) {
            A scaled[P];
            NF_UNROLL
            for (int j = 0; j < P; ++j) scaled[j] = lanes.dz[j] * lanes.xc[j] * c.rstd[0];
            const ChannelSums<T, kWide, kSums> channels(call);
            channels.add_lanes(sum_dz, slab.set_in_block, spot.column + part, lanes.dz);
            channels.add_lanes(sum_dz_xc, slab.set_in_block, spot.column + part, scaled);
            if constexpr (kSums == 3)
                if (call.channel_sums[sum_act]) channels.add_lanes(sum_act, slab.set_in_block, spot.column + part, lanes.dact);
        }
    }
}

// A row of this team is complete. All threads come here together.
template <class T, bool kWide, bool kRows, int kSums>
NF_DEVICE void end_row(const Call& call, const Slab<T, kWide>& slab, int at_row, int64_t unit, const Coefficients<T, kWide, kRows>& c,
                       Sums<AccumulatorOf<T>, kSums> (&sets)[sum_lanes<T, kWide>], Sums<AccumulatorOf<T>, kSums>& row) {
    using A = AccumulatorOf<T>;
    const bool there = at_row < slab.rows;
    if constexpr (kWide) {
        // of one channel: the set's sums are the channel's; the weight joins later
        const A weight = call.walk.one_channel || call.tensors.scale ? A(1) : there ? c.weight[0] : A(0);
        sets[0].of[sum_dz] = fma_(weight, row.of[sum_dz], sets[0].of[sum_dz]);
        sets[0].of[sum_dz_xc] = fma_(weight, row.of[sum_dz_xc], sets[0].of[sum_dz_xc]);
        if constexpr (kSums == 3) sets[0].of[sum_act] += row.of[sum_act];
        if (!call.walk.one_channel && call.channel_sums[sum_dz]) {
            const Sums<A, kSums> whole = over_team<A>(row, slab.team, call.scratch_offset);
            const int64_t vector_chunk = slab.chunk % call.walk.vector_chunks, n = quotient(slab.outer, call.walk.period);
            if (there && slab.lane == 0)
                store_channel_sums(call, vector_chunk * call.problem.N + n, slab.row_channel(call.walk, at_row), whole);
        }
    } else if (call.channel_sums[sum_dz]) {
        const Sums<A, kSums> whole = over_team<A>(row, slab.team, call.scratch_offset);
        if (there && slab.lane == 0) {
            if (call.sums_offset < 0) store_channel_sums(call, unit, at_row, whole);
            else ChannelSums<T, kWide, kSums>(call).add_row(at_row, whole);
        }
    }
    row = Sums<A, kSums>();
}

// The stash of the first pass: x, dy, then the residual or the bits
template <class T, int K> struct GradientStash {
    static constexpr int V = vector_size<T>;
    const Landing<K>& landing;
    bool residual, mask;

    const Shared<T> all;

    NF_DEVICE GradientStash(int source, const Landing<K>& landing_)
        : landing(landing_),
          residual(source == z_of_residual),
          mask(source == z_of_mask),
          all(pinned(shared_at<T>(0, (residual ? 3 : 2) * landing_.vectors() * V))) {}
    NF_DEVICE Shared<T> of(int tensor) const { return all.part(tensor * landing.vectors() * V, landing.vectors() * V); }
    NF_DEVICE Shared<uint8_t> bits() const { return shared_at<uint8_t>(2 * landing.vectors() * 16, landing.vectors()); }

    template <bool kRegular> NF_DEVICE void keep(int b, const Spot<kRegular> (&spots)[K], const GradientBatch<T, K>& batch) const {
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            if (spots[k].empty()) continue;
            const int slot = landing.slot(b, k);
            of(0).template store<V>(slot * V, batch.x[k].pack());
            of(1).template store<V>(slot * V, batch.dy[k].pack());
            if (residual) of(2).template store<V>(slot * V, batch.residual[k].pack());
            if (mask) bits().set(slot, batch.bits[k]);
        }
    }
    // ``with_bits``: those of a batch that passes are not there
    template <bool kRegular>
    NF_DEVICE void recall(int b, const Spot<kRegular> (&spots)[K], bool with_bits, GradientBatch<T, K>& batch) const {
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            if (spots[k].empty()) continue;
            const int slot = landing.slot(b, k);
            batch.x[k] = of(0).template load<V>(slot * V);
            batch.dy[k] = of(1).template load<V>(slot * V);
            if (residual) batch.residual[k] = of(2).template load<V>(slot * V);
            if (with_bits) batch.bits[k] = bits().get(slot);
        }
    }
};

// Adds the next batch of the walk to the sums
template <class T, bool kWide, bool kRows, int kAct, int K, bool kRegular, class Batch>
NF_DEVICE void add_gradient_batch(const Call& call, const Slab<T, kWide>& slab, int64_t unit, Coefficients<T, kWide, kRows>& c,
                                  const typename Slab<T, kWide>::Cursor (&cursors)[K], const Spot<kRegular> (&spots)[K], Batch& batch,
                                  Sums<AccumulatorOf<T>, gradient_sums<kAct>> (&sets)[sum_lanes<T, kWide>],
                                  Sums<AccumulatorOf<T>, gradient_sums<kAct>>& row) {
    using A = AccumulatorOf<T>;
    constexpr int P = part_size<T, kAct>;
    const Arguments& t = call.tensors;
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        if constexpr (!kRegular && kWide && kRows && clears_outside<kAct>) {  // the sums take all lanes
            slab.clear_outside(spots[k], batch.x[k]);
            slab.clear_outside(spots[k], batch.dy[k]);
            if (t.residual || (Batch::of_step && t.against)) slab.clear_outside(spots[k], batch.residual[k]);
            if constexpr (Batch::of_step) {
                if (t.dshifted) slab.clear_outside(spots[k], batch.dshifted[k]);
            }
        }
        if (!spots[k].empty()) {
            c.turn_to(call, slab, spots[k]);
            NF_UNROLL
            for (int part = 0; part < vector_size<T>; part += P) {
                GradientLanes<A, P> lanes;
                gradient_lanes<T, kWide, kRows, kAct>(call, slab, spots[k], c, batch, k, part, lanes);
                if constexpr (Batch::of_step) {
                    if (opaque(int(t.against != nullptr))) {
                        NF_UNROLL
                        for (int j = 0; j < P; ++j) lanes.xc[j] = batch.residual[k].get(part + j);
                    }
                }
                add_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, c, lanes, part, slab, spots[k], sets, row);
            }
        }
        if (kRows && slab.row_ends(cursors[k]))
            end_row<T, kWide, kRows, gradient_sums<kAct>>(call, slab, cursors[k].row, unit, c, sets, row);
    }
}

// The first pass of a backward over a slab
template <class T, bool kWide, bool kRows, int kAct, int K, class Batch>
NF_DEVICE void collect_gradients(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing, int64_t unit,
                                 Coefficients<T, kWide, kRows>& c, Batch& batch,
                                 Sums<AccumulatorOf<T>, gradient_sums<kAct>> (&sets)[sum_lanes<T, kWide>]) {
    const GradientStash<T, K> stash(batch.source, landing);
    Sums<AccumulatorOf<T>, gradient_sums<kAct>> row;
    auto cursor = slab.start();
    NF_NO_UNROLL
    for (int b = 0; b <= landing.last; ++b) {
        slab.template next<K, kWide && kAct != any_act>(cursor, [&](const auto& cursors, const auto& spots) {
            load_gradients<kAct>(call, slab, cursors, spots, batch);
            add_gradient_batch<T, kWide, kRows, kAct, K>(call, slab, unit, c, cursors, spots, batch, sets, row);
            if (landing.stays(b)) stash.keep(b, spots, batch);
        });
    }
}

// Asks for batch b of the walk that ``cursor`` is at, all but its bits
template <int kAct, class T, bool kWide, int K>
NF_DEVICE void ask_gradients(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing, const Global<const T>& x,
                             const Global<const T>& dy, const GradientStash<T, K>& stash, typename Slab<T, kWide>::Cursor& cursor, int b) {
    const Arguments& t = call.tensors;
    if (b < landing.last) {
        slab.template next<K, kWide && kAct != any_act>(cursor, [&](const auto&, const auto& spots) {
            NF_UNROLL
            for (int k = 0; k < K; ++k) {
                const int at = landing.slot(b, k) * vector_size<T>;
                slab.template fetch<clears_outside<kAct>>(x, spots[k], stash.of(0), at, landing.cache(b));
                slab.template fetch<clears_outside<kAct>>(dy, spots[k], stash.of(1), at, landing.cache(b));
                if (stash.residual)
                    slab.template fetch<clears_outside<kAct>>(slab.at_corner(t.residual), spots[k], stash.of(2), at, landing.cache(b));
            }
        });
    }
    copy_async_commit();
}

// The same with loads ahead (owners.cuh). The mask has a byte where an asynchronous copy takes four: its bytes are read a batch ahead.
template <class T, bool kWide, bool kRows, int kAct, int K>
NF_DEVICE void collect_gradients_ahead(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing, int early, int64_t unit,
                                       Coefficients<T, kWide, kRows>& c, GradientBatch<T, K>& batch,
                                       Sums<AccumulatorOf<T>, gradient_sums<kAct>> (&sets)[sum_lanes<T, kWide>]) {
    const Arguments& t = call.tensors;
    const GradientStash<T, K> stash(batch.source, landing);
    const int last = landing.last, source = batch.source;
    Sums<AccumulatorOf<T>, gradient_sums<kAct>> row;
    // two instructions less for each load, where there are registers for it
    const auto corner = [&](const void* tensor) { return kAct == any_act ? slab.at_corner(tensor) : pinned(slab.at_corner(tensor)); };
    const Global<const T> x = corner(t.x), dy = corner(t.dy);
    auto asked = slab.after(early * K);
    NF_NO_UNROLL
    for (int b = early; b < landing.ahead; ++b) ask_gradients<kAct>(call, slab, landing, x, dy, stash, asked, b);
    auto end = slab.after(last * K), cursor = slab.start(), marked = cursor;
    slab.template next<K, kWide && kAct != any_act>(
        end, [&](const auto& cursors, const auto& spots) { load_gradients<kAct>(call, slab, cursors, spots, batch); });
    uint8_t coming[K] = {};
    const auto read_bits = [&](int b) {
        if (b >= last) return;
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            coming[k] = slab.has(marked) ? Global<const uint8_t>(t.mask).load(slab.mask_at(call.walk, marked)) : uint8_t(0);
            slab.advance(marked);
        }
    };
    if (stash.mask) read_bits(0);
    NF_NO_UNROLL
    for (int b = 0; b < last; ++b) {
        slab.template next<K, kWide && kAct != any_act>(cursor, [&](const auto& cursors, const auto& spots) {
            GradientBatch<T, K> now(source);
            if (stash.mask) {
                NF_UNROLL
                for (int k = 0; k < K; ++k) {
                    now.bits[k] = coming[k];
                    if (landing.stays(b)) stash.bits().set(landing.slot(b, k), coming[k]);
                }
                read_bits(b + 1);
            }
            copy_async_wait<Landing<K>::ahead - 1>();
            stash.recall(b, spots, false, now);
            add_gradient_batch<T, kWide, kRows, kAct, K>(call, slab, unit, c, cursors, spots, now, sets, row);
        });
        if (b + landing.ahead >= early) ask_gradients<kAct>(call, slab, landing, x, dy, stash, asked, b + landing.ahead);
    }
    slab.template next<K, kWide && kAct != any_act>(cursor, [&](const auto& cursors, const auto& spots) {
        add_gradient_batch<T, kWide, kRows, kAct, K>(call, slab, unit, c, cursors, spots, batch, sets, row);
    });
}

template <class T, bool kWide, bool kRows, int kAct> NF_KERNEL(threads_of<kWide>) grad_moments_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    const Slab<T, kWide> slab(call.walk, block_index());
    Coefficients<T, kWide, kRows> c;
    saved_statistics<T, kWide, kRows>(call, slab, c);
    c.renew(call, slab);
    Sums<A, gradient_sums<kAct>> sets[sum_lanes<T, kWide>];
    StepBatch<T, gradient_batch> batch(call);
    const Landing<gradient_batch> landing(call, slab.steps);
    collect_gradients<T, kWide, kRows, kAct>(call, slab, landing, block_index(), c, batch, sets);
    if (kWide && !call.walk.one_channel) return;  // the rows' sums are written
    leave_partials<T, kWide>(call, slab, sets);
}

}  // namespace normfused
