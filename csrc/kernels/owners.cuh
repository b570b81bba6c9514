// Sets that several blocks hold: their values from the blocks', in every one of them; and loads that run ahead of their use.
//
// Blocks of a cluster read each other's values from shared memory; a group of co-resident blocks leaves its values in ``partial`` and meets
// at an arrival word. Values merge in the order of the chunks, so that the bits are the same in every run.
//
// Wide: a value a block, which all blocks read: 16 bytes from each of the others. Narrow: a value per column. The blocks of a cluster read
// all of them; those of a group, which are many, each finish some of the sets, and meet again before they read the others': 48 bytes a
// column and block together.
#pragma once

#include "moments.cuh"

namespace normfused {

NF_DEVICE void meet_group(const Call& call, int64_t chunk) {
    const int64_t chunks = call.walk.chunks, group = quotient(block_index(), chunks);
    sync_blocks(Global<uint32_t>(call.tensors.arrivals).advance(call.group_words + group), unsigned(chunks), chunk == 0);
}

// The blocks' values of a wide set, in all their threads: each leaves its own, they meet, and then merge those of chunks [first, last)
template <class T, class Value> struct WideExchange {
    using A = AccumulatorOf<T>;
    const Call& call;
    const Slab<T, true>& slab;
    Value own;

    NF_DEVICE WideExchange(const Call& call_, const Slab<T, true>& slab_, const Value& v) : call(call_), slab(slab_), own(v) {
        if (call.owner == Owner::cluster) {
            if (thread_index() == 0) {
                NF_UNROLL
                for (int i = 0; i < Value::size; ++i) mine().set(i, v.get(i));
            }
            sync_cluster();
        } else if (call.owner == Owner::group) {
            if (thread_index() == 0) store_partial<A, true>(call, slab.outer, 0, slab.chunk, v);
            meet_group(call, slab.chunk);
        }
    }
    NF_DEVICE Shared<A> mine() const { return shared_at<A>(call.exchange_offset, Value::size); }
    NF_DEVICE Value merged(int first, int last) const {
        if (call.owner == Owner::block) return own;
        if (call.owner == Owner::group) return over_wide_set(call, slab, gather_partials<T, Value>(call, slab, first, last));
        Value other;
        const int block = int(lane_index());
        if (block >= first && block < last) {
            const Shared<A> theirs = mine().on_block(unsigned(block));
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) other.set(i, theirs.get(i));
        }
        return over_lanes(other, 32);
    }
    NF_DEVICE Value merged() const { return merged(0, int(call.walk.chunks)); }
};

template <class T, class Value> NF_DEVICE Value over_owners(const Call& call, const Slab<T, true>& slab, const Value& v) {
    return WideExchange<T, Value>(call, slab, v).merged();
}

// The values of a narrow slab's columns, from the blocks of a group: [column][chunk], four numbers each
template <class T, class Value> struct ColumnValues {
    using A = AccumulatorOf<T>;
    static constexpr int P = 4, kPart = 16 / int(sizeof(A));
    static_assert(Value::size <= P);
    Global<A> numbers;
    int64_t first, chunks;

    NF_DEVICE ColumnValues(const Call& call, const Slab<T, false>& slab)
        : numbers(call.partial), first(slab.outer * call.walk.cols + slab.column0), chunks(call.walk.chunks) {}
    NF_DEVICE void set(int column, int chunk, const Value& v) const {
        NF_UNROLL
        for (int part = 0; part < P; part += kPart) {
            Pack<A, kPart> pack;
            NF_UNROLL
            for (int i = 0; i < kPart; ++i) pack.data[i] = part + i < Value::size ? v.get(part + i) : A(0);
            numbers.template store<kPart>(((first + column) * chunks + chunk) * P + part, pack);
        }
    }
    NF_DEVICE Value get(int column, int chunk) const {
        Value v;
        NF_UNROLL
        for (int part = 0; part < P; part += kPart) {
            const Pack<A, kPart> pack = numbers.template load_coherent<kPart>(((first + column) * chunks + chunk) * P + part);
            NF_UNROLL
            for (int i = 0; i < kPart; ++i)
                if (part + i < Value::size) v.set(part + i, pack.data[i]);
        }
        return v;
    }
};

// The block's value of every column of a narrow slab, for the others of its cluster
template <class T, class Value> NF_DEVICE Table<AccumulatorOf<T>, Value> exchanged_columns(const Call& call, const Slab<T, false>& slab) {
    return Table<AccumulatorOf<T>, Value>(call.exchange_offset, 1, slab.team * vector_size<T>);
}

// The values of a narrow slab's columns -> two numbers of its sets for the lanes of every thread. columns(on_column) has one thread a
// column call on_column(column, value of this block); before() runs in every block before the owners meet, and may leave two numbers a set
// for on_set in SetNumbers. on_column(column, value, stores) may change a column's value before it joins its set's; on_set(set of the slab,
// value, stores) gives the numbers; ``stores`` in one block.
template <bool kShared, class T, class Value, class Columns, class Before, class OnColumn, class OnSet>
NF_DEVICE void over_owned_sets(const Call& call, const Slab<T, false>& slab, const Columns& columns, const Before& before,
                               const OnColumn& on_column, const OnSet& on_set, AccumulatorOf<T> (&first)[vector_size<T>],
                               AccumulatorOf<T> (&second)[vector_size<T>]) {
    using A = AccumulatorOf<T>;
    if (kShared && call.owner == Owner::group) {
        const ColumnValues<T, Value> values(call, slab);
        columns([&](int column, const Value& value) { values.set(column, slab.chunk, value); });
        before();
        meet_group(call, slab.chunk);
        // q and r of the sets, or mean and rstd
        const Global<A> firsts = Global<A>(call.pairs[0]).advance(slab.first_set(call.walk));
        const Global<A> seconds = Global<A>(call.pairs[1]).advance(slab.first_set(call.walk));
        const int sets = slab.sets(call.walk), chunks = int(call.walk.chunks);
        const int begin = int(int64_t(sets) * slab.chunk / chunks), end = int(int64_t(sets) * (slab.chunk + 1) / chunks);
        over_columns<T, Value>(
            call, begin, end, chunks, [&](int chunk, int column) { return values.get(column, chunk); },
            [&](int column, Value& value) { on_column(column, value, true); },
            [&](int set, const Value& value) {
                const Pair<A> pair = on_set(set, value, true);
                firsts.store(set, pair.first);
                seconds.store(set, pair.second);
            });
        meet_group(call, slab.chunk);
        const SetNumbers<T> numbers(call, slab);
        for (int set = int(thread_index()); set < sets; set += int(block_threads()))
            numbers.leave(set, {firsts.load_coherent(set), seconds.load_coherent(set)});
        return numbers.take(call, slab, first, second);
    }
    const Table<A, Value> own = exchanged_columns<T, Value>(call, slab);
    columns([&](int column, const Value& value) { own.set(0, column, value); });
    before();
    const bool cluster = kShared && call.owner == Owner::cluster, stores = slab.chunk == 0;
    if (cluster) sync_cluster();
    else sync_block();
    over_narrow_sets<T, Value>(
        call, slab, int(call.walk.chunks),
        [&](int chunk, int column) { return cluster ? own.on_block(chunk).get(0, column) : own.get(0, column); },
        [&](int column, Value& value) { on_column(column, value, stores); },
        [&](int set, const Value& value) { return on_set(set, value, stores); }, first, second);
}

// Before a block leaves: others of its cluster may still be reading its value
NF_DEVICE void leave_owners(const Call& call) {
    if (call.owner == Owner::cluster) leave_cluster();
}

// Asks for batch b of the walk that ``cursor`` is at
template <class T, bool kWide, int K> NF_DEVICE void ask(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing,
                                                         const Global<const T>& x, const Shared<T>& stash,
                                                         typename Slab<T, kWide>::Cursor& cursor, int b) {
    constexpr int V = vector_size<T>;
    if (b < landing.last) {
        slab.template next<K, true>(cursor, [&](const auto&, const auto& spots) {
            NF_UNROLL
            for (int k = 0; k < K; ++k) slab.fetch(x, spots[k], stash, landing.slot(b, k) * V, landing.cache(b));
        });
    }
    copy_async_commit();
}

// `collect` (moments.cuh) with loads ahead; of the first ``early`` batches they are under way
template <class T, bool kWide, int K> NF_DEVICE void collect_ahead(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing,
                                                                   int early, Vector<T> (&batch)[K],
                                                                   Moments<AccumulatorOf<T>> (&moments)[sum_lanes<T, kWide>]) {
    constexpr int V = vector_size<T>;
    ThreadMoments<T, kWide> own(call.problem.centred());
    const Shared<T> stash = pinned(shared_at<T>(0, landing.vectors() * V));
    const Global<const T> x = pinned(slab.at_corner(call.tensors.x));
    auto asked = slab.after(early * K), cursor = slab.start(), end = slab.after(landing.last * K);
    NF_NO_UNROLL
    for (int b = early; b < landing.ahead; ++b) ask(call, slab, landing, x, stash, asked, b);
    // the one that stays in registers, which may wait for it: after the others were asked for
    slab.template next<K, true>(end, [&](const auto&, const auto& spots) {
        NF_UNROLL
        for (int k = 0; k < K; ++k) batch[k] = slab.load(call.tensors.x, spots[k]);
    });
    NF_NO_UNROLL
    for (int b = 0; b < landing.last; ++b) {
        slab.template next<K, true>(cursor, [&](const auto&, const auto& spots) {
            copy_async_wait<Landing<K>::ahead - 1>();
            Vector<T> now[K];
            NF_UNROLL
            for (int k = 0; k < K; ++k)
                if (!spots[k].empty()) now[k] = stash.template load<V>(landing.slot(b, k) * V);
            own.add(now, spots);
        });
        if (b + landing.ahead >= early) ask(call, slab, landing, x, stash, asked, b + landing.ahead);
    }
    slab.template next<K, true>(cursor, [&](const auto&, const auto& spots) { own.add(batch, spots); });
    own.give(moments);
}

}  // namespace normfused
