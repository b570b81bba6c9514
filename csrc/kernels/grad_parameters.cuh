// The gradients of the parameters from sums per channel of every sample or block (channel_sums [entry][C]):
//
//   dweight_c = sum over entries of rstd*sum_dz_xc    dbias_c = of sum_dz    dact_weight_c = of sum_act
//   drule_weight_c = -1/2 sign(rule_weight) * sum of rstd^3 weight sum_dz_xc
//
// In a fixed order, by the threads of a block that share a channel; a parameter that all channels share is summed last. Runs as the
// tail of a backward, in its last block (call.finish), or as a launch of its own. Tiny: reads 3*entries*C numbers.
#pragma once

#include "moments.cuh"

namespace normfused {

enum : int { grad_weight = 0, grad_bias = 1, grad_act = 2, grad_eps = 3 };

// Every ``members``-th entry of a channel
template <class A> NF_DEVICE Sums<A, 4> channel_gradients(const Call& call, int64_t channel, int member, int members) {
    const Problem& p = call.problem;
    const Arguments& t = call.tensors;
    const Global<A> dz(call.channel_sums[0]), dz_xc(call.channel_sums[1]), dact(call.channel_sums[2]), rstds(t.rstd);
    const bool scaled = p.scope == Scope::position;  // with rstd, already
    const int64_t group = p.scope == Scope::sample_group ? quotient(channel, p.C / p.groups) : 0;
    const A weight = t.drule_weight.data ? load_parameter(t.weight, channel, A(1)) : A(0);
    Sums<A, 4> sums;
    for (int64_t entry = member; entry < call.entries; entry += members) {
        const int64_t at = entry * p.C + channel;
        if (dz) sums.of[grad_bias] += dz.load_coherent(at);
        if (dact) sums.of[grad_act] += dact.load_coherent(at);
        if (!dz_xc) continue;
        const A product = dz_xc.load_coherent(at);
        A rstd = A(1);
        if (!scaled) rstd = rstds.load_coherent(p.scope == Scope::channel ? channel : entry % p.N * p.groups + group);
        sums.of[grad_weight] = fma_(product, rstd, sums.of[grad_weight]);
        sums.of[grad_eps] = fma_(product * weight, rstd * rstd * rstd, sums.of[grad_eps]);
    }
    return sums;
}

template <class A> NF_DEVICE void parameter_gradients(const Call& call, int64_t block, int64_t blocks) {
    const Problem& p = call.problem;
    const Arguments& t = call.tensors;
    const int threads = int(block_threads());
    // lanes of a warp are neighbouring channels; its 32 rows of threads split the entries
    const int rows = threads / 32, row = int(warp_index()), lane = int(lane_index());
    const Shared<A> scratch = shared_at<A>(call.scratch_offset, 4 * threads);
    const int64_t tiles = ceil_quotient(p.C, 32);
    for (int64_t tile = block; tile < tiles; tile += blocks) {
        const int64_t channel = tile * 32 + lane;
        Sums<A, 4> sums;
        if (channel < p.C) sums = channel_gradients<A>(call, channel, row, rows);
        NF_UNROLL
        for (int i = 0; i < 4; ++i) scratch.set((i * rows + row) * 32 + lane, sums.of[i]);
        sync_block();
        if (row == 0 && channel < p.C) {
            Sums<A, 4> total;
            for (int other = 0; other < rows; ++other) {
                NF_UNROLL
                for (int i = 0; i < 4; ++i) total.of[i] += scratch.get((i * rows + other) * 32 + lane);
            }
            if (t.dweight.per_channel) store_parameter(t.dweight, channel, total.of[grad_weight]);
            if (t.dbias.per_channel) store_parameter(t.dbias, channel, total.of[grad_bias]);
            if (t.dact_weight.per_channel) store_parameter(t.dact_weight, channel, total.of[grad_act]);
            const A eps = load_parameter(t.rule_weight, channel, A(0));
            if (t.drule_weight.per_channel) store_parameter(t.drule_weight, channel, rms::eps_gradient(total.of[grad_eps], eps));
        }
        sync_block();
    }
}

// Parameters that all channels share, by one block
template <class A> NF_DEVICE void shared_gradients(const Call& call) {
    const Arguments& t = call.tensors;
    const bool act = t.dact_weight.data && !t.dact_weight.per_channel, eps = t.drule_weight.data && !t.drule_weight.per_channel;
    if (!act && !eps) return;
    Sums<A, 2> sums;
    for (int64_t channel = thread_index(); channel < call.problem.C; channel += block_threads()) {
        const Sums<A, 4> of_channel = channel_gradients<A>(call, channel, 0, 1);
        sums.of[0] += of_channel.of[grad_act];
        sums.of[1] += of_channel.of[grad_eps];
    }
    sums = over_set<A>(sums, int(block_threads()), call.scratch_offset);
    if (thread_index() != 0) return;
    if (act) store_parameter(t.dact_weight, 0, sums.of[0]);
    if (eps) store_parameter(t.drule_weight, 0, rms::eps_gradient(sums.of[1], load_parameter(t.rule_weight, 0, A(0))));
}

template <class A> NF_KERNEL(256) grad_parameters_kernel(NF_GRID_CONSTANT Call call) {
    parameter_gradients<A>(call, block_index(), grid_blocks());
    if (block_index() == 0) shared_gradients<A>(call);
}

}  // namespace normfused
