// A set that several blocks hold: its value from theirs, in every one of them; and loads that run ahead of their use.
//
// Blocks of a cluster read each other's value from shared memory; a group of co-resident blocks leaves its values in ``partial`` and meets
// at an arrival word. Values merge in the order of the chunks, so that the bits are the same in every run. A block sends and reads a few
// numbers per set: 16 bytes from each of the others.
#pragma once

#include "moments.cuh"

namespace normfused {

// ``v``: the block's value, in all its threads
template <class T, class Value> NF_DEVICE Value over_owners(const Call& call, const Slab<T, true>& slab, const Value& v) {
    using A = AccumulatorOf<T>;
    if (call.owner == Owner::block) return v;
    if (call.owner == Owner::cluster) {
        const Shared<A> mine = shared_at<A>(call.exchange_offset, Value::size);
        if (thread_index() == 0) {
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) mine.set(i, v.get(i));
        }
        sync_cluster();
        Value other;
        if (lane_index() < cluster_blocks()) {
            const Shared<A> theirs = mine.on_block(lane_index());
            NF_UNROLL
            for (int i = 0; i < Value::size; ++i) other.set(i, theirs.get(i));
        }
        return over_lanes(other, 32);
    }
    if (thread_index() == 0) store_partial<A, true>(call, slab.outer, 0, slab.chunk, v);
    const int64_t chunks = call.walk.chunks, group = quotient(block_index(), chunks);
    sync_blocks(Global<uint32_t>(call.tensors.arrivals).advance(call.group_words + group), unsigned(chunks), slab.chunk == 0);
    return over_wide_set(call, slab, gather_partials<T, Value>(call, slab));
}

// Before a block leaves: others of its cluster may still be reading its value
NF_DEVICE void leave_owners(const Call& call) {
    if (call.owner == Owner::cluster) leave_cluster();
}

// Asks for batch b of the walk that ``cursor`` is at
template <class T, bool kWide, int K> NF_DEVICE void ask(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing,
                                                         typename Slab<T, kWide>::Cursor& cursor, int b) {
    constexpr int V = vector_size<T>;
    if (b < landing.last) {
        const Shared<T> stash = shared_at<T>(0, landing.vectors() * V);
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            slab.fetch(call.tensors.x, slab.spot(cursor), stash, landing.slot(b, k) * V, landing.cache(b));
            slab.advance(cursor);
        }
    }
    copy_async_commit();
}

// `collect` (moments.cuh) with loads ahead; of the first ``early`` batches they are under way
template <class T, bool kWide, int K> NF_DEVICE void collect_ahead(const Call& call, const Slab<T, kWide>& slab, const Landing<K>& landing,
                                                                   int early, Vector<T> (&batch)[K],
                                                                   Moments<AccumulatorOf<T>> (&moments)[sum_lanes<T, kWide>]) {
    constexpr int V = vector_size<T>;
    ThreadMoments<T, kWide> own;
    const Shared<T> stash = shared_at<T>(0, landing.vectors() * V);
    auto asked = slab.after(early * K);
    NF_NO_UNROLL
    for (int b = early; b < landing.ahead; ++b) ask(call, slab, landing, asked, b);
    // the one that stays in registers, which may wait for it: after the others were asked for
    auto cursor = slab.after(landing.last * K);
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        batch[k] = slab.load(call.tensors.x, slab.spot(cursor));
        slab.advance(cursor);
    }
    cursor = slab.start();
    Spot spots[K];
    NF_NO_UNROLL
    for (int b = 0; b < landing.last; ++b) {
        copy_async_wait<Landing<K>::ahead - 1>();
        Vector<T> now[K];
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            spots[k] = slab.spot(cursor);
            slab.advance(cursor);
            now[k] = stash.template load<V>(landing.slot(b, k) * V);
        }
        own.add(now, spots, call.problem.centred);
        if (b + landing.ahead >= early) ask(call, slab, landing, asked, b + landing.ahead);
    }
    NF_UNROLL
    for (int k = 0; k < K; ++k) {
        spots[k] = slab.spot(cursor);
        slab.advance(cursor);
    }
    own.add(batch, spots, call.problem.centred);
    own.give(moments);
}

}  // namespace normfused
