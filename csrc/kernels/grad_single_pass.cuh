// grad_moments -> coefficients_vjp -> grad_apply in one launch: dy and x (and the residual or mask) stay on chip in between.
//
// Slabs as in single_pass.cuh. Reads dy and x once, writes dx once (3T). Gradients of parameters: written here where a channel is a
// set; else sums per channel are left, for each sample or (position sets, whose blocks walk over many slabs) each block, and summed by
// the last block to finish (call.finish) or by the next launch.
#pragma once

#include "grad_apply.cuh"
#include "grad_parameters.cuh"
#include "samples.cuh"

namespace normfused {

template <class T, bool kWide, bool kRows, int kAct, bool kApart> NF_KERNEL(threads_of<kWide>)
grad_single_pass_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    constexpr bool kPositions = kWide != kRows;
    Coefficients<T, kWide, kRows> c;
    const bool keeps_sums = kPositions && call.sums_offset >= 0;
    if (keeps_sums) ChannelSums<T, kWide, gradient_sums<kAct>>(call).clear();
    int base = 0, early = 0;  // as in single_pass.cuh
    for (int64_t unit = block_index(); unit < call.walk.units; unit += grid_blocks()) {
        const Slab<T, kWide> slab(call.walk, unit);
        const Landing<gradient_batch> landing(call, slab.steps, base);
        GradientCoefficients<T, kWide> g;
        Sums<A, gradient_sums<kAct>> sets[sum_lanes<T, kWide>];
        GradientBatch<T, gradient_batch> batch(call);
        if constexpr (kApart) {
            saved_samples<T, kWide, kRows>(call, slab, c);
        } else {
            saved_statistics<T, kWide, kRows>(call, slab, c);
            c.renew(call, slab);
        }
        if constexpr (kWide == kRows) {
            collect_gradients_ahead<T, kWide, kRows, kAct>(call, slab, landing, early, unit, c, batch, sets);
            if (call.walk.spare > 0 && unit + grid_blocks() < call.walk.units) {
                const Slab<T, kWide> next(call.walk, unit + grid_blocks());
                const Landing<gradient_batch> place(call, next.steps, base = landing.next_base());
                auto cursor = next.start();
                const GradientStash<T, gradient_batch> stash(batch.source, place);
                early = min_(call.walk.spare, place.last);
                NF_NO_UNROLL
                for (int b = 0; b < early; ++b)
                    ask_gradients<kAct>(call, next, place, next.at_corner(call.tensors.x), next.at_corner(call.tensors.dy), stash, cursor,
                                        b);
            }
        } else {
            collect_gradients<T, kWide, kRows, kAct>(call, slab, landing, unit, c, batch, sets);
        }
        if constexpr (kApart) finish_sample_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, slab, c, sets, g);
        else finish_gradients<T, kWide, kRows, gradient_sums<kAct>>(call, slab, sets, false, g);
        grad_apply_slab<T, kWide, kRows, kAct>(call, slab, landing, true, batch, c, g);
    }
    if (keeps_sums) ChannelSums<T, kWide, gradient_sums<kAct>>(call).leave(call, block_index());
    leave_owners(call);
    if (call.finish && last_to_arrive(Global<uint32_t>(call.tensors.arrivals), grid_blocks())) {
        parameter_gradients<A>(call, 0, 1);
        shared_gradients<A>(call);
    }
}

// Position sets whose sums per channel fit no block: one more pass over dy and x, along the columns, a row having statistics of its own.
template <class T> NF_KERNEL(threads_of<false>) grad_columns_kernel(NF_GRID_CONSTANT Call call) {
    using A = AccumulatorOf<T>;
    constexpr int V = vector_size<T>, P = part_size<T, any_act>;
    const Slab<T, false> slab(call.walk, block_index());
    const Arguments& t = call.tensors;
    const Global<A> means(t.mean), rstds(t.rstd);
    Coefficients<T, true, false> c;  // statistics of the row, parameters of the columns
    Sums<A, 3> columns[V];
    GradientBatch<T, 1> batch(call);
    auto cursor = slab.start();
    for (int step = 0; step < slab.steps; ++step) {
        const typename Slab<T, false>::Cursor cursors[1] = {cursor};
        const Spot<false> spots[1] = {slab.spot(cursor)};
        slab.advance(cursor);
        load_gradients<any_act>(call, slab, cursors, spots, batch);
        if (spots[0].empty()) continue;
        c.turn_to(call, slab, spots[0]);
        c.mean[0] = means ? means.load_coherent(slab.row0 + spots[0].row) : A(0);
        c.rstd[0] = rstds.load_coherent(slab.row0 + spots[0].row);
        NF_UNROLL
        for (int part = 0; part < V; part += P) {
            GradientLanes<A, P> lanes;
            gradient_lanes<T, true, false, any_act>(call, slab, spots[0], c, batch, 0, part, lanes);
            NF_UNROLL
            for (int j = 0; j < P; ++j) {
                Sums<A, 3>& column = columns[part + j];
                column.of[sum_dz] += lanes.dz[j];
                column.of[sum_dz_xc] = fma_(lanes.dz[j] * lanes.xc[j], c.rstd[0], column.of[sum_dz_xc]);
                column.of[sum_act] += lanes.dact[j];
            }
        }
    }
    over_teams(call, slab, columns,
               [&](int column, const Sums<A, 3>& sums) { store_channel_sums(call, slab.chunk, slab.column0 + column, sums); });
}

}  // namespace normfused
