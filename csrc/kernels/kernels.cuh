// Which kernels exist: the one list of instantiations, and the launch of one of them by name.
//
// Per storage type: the streaming kernels for wide sets along rows and narrow sets along columns, the single passes for all four views
// (walk.h); of each that applies an activation, one instantiation per entry of ``hot`` and one for all other activations. Single passes of
// batch-instance norm have the latter alone.
#pragma once

#include "grad_single_pass.cuh"
#include "settle.cuh"
#include "single_pass.cuh"

namespace normfused {

enum class Kernel : int {
    moments,
    apply,
    single_pass,
    grad_moments,
    grad_apply,
    grad_single_pass,
    settle,
    grad_settle,
    settle_sets,
    grad_settle_sets,
    grad_columns,
    grad_parameters,
    average_running,
    count_batch
};

struct Launch {
    Kernel kernel;
    bool wide, rows;
    uint32_t blocks, threads, shared_bytes;
    const char* name;
    bool cooperative = false;
    uint32_t cluster = 1;
};

template <class T, bool kWide, bool kRows, int kAct> int launch_with(const Launch& l, const LaunchConfig& config, const Call& call) {
    switch (l.kernel) {
        case Kernel::single_pass: return launch(&single_pass_kernel<T, kWide, kRows, kAct, false>, config, call);
        case Kernel::grad_single_pass: return launch(&grad_single_pass_kernel<T, kWide, kRows, kAct, false>, config, call);
        default: break;
    }
    if constexpr (kWide == kRows) {
        switch (l.kernel) {
            case Kernel::apply: return launch(&apply_kernel<T, kWide, kRows, kAct>, config, call);
            case Kernel::grad_moments: return launch(&grad_moments_kernel<T, kWide, kRows, kAct>, config, call);
            case Kernel::grad_apply: return launch(&grad_apply_kernel<T, kWide, kRows, kAct>, config, call);
            default: break;
        }
    }
    return not_supported;
}

template <class T, bool kWide, bool kRows> int launch_with_act(const Launch& l, const LaunchConfig& config, const Call& call) {
    if constexpr (kWide == kRows) {
        const bool apart = call.problem.rule == Rule::batch_instance;
        if (apart && l.kernel == Kernel::single_pass) return launch(&single_pass_kernel<T, kWide, kRows, any_act, true>, config, call);
        if (apart && l.kernel == Kernel::grad_single_pass)
            return launch(&grad_single_pass_kernel<T, kWide, kRows, any_act, true>, config, call);
    }
    if constexpr (sizeof(T) < 8) {  // float64 is for checking, not for speed
        switch (call.problem.act) {
            case Act::identity: return launch_with<T, kWide, kRows, int(Act::identity)>(l, config, call);
            case Act::relu:
            case Act::leaky_relu: return launch_with<T, kWide, kRows, int(Act::relu)>(l, config, call);
            case Act::silu: return launch_with<T, kWide, kRows, int(Act::silu)>(l, config, call);
            default: break;
        }
    }
    return launch_with<T, kWide, kRows, any_act>(l, config, call);
}

template <class T> int launch_kernel(const Launch& l, const Call& call, void* stream) {
    using A = AccumulatorOf<T>;
    const LaunchConfig config = {l.name, l.blocks, l.threads, l.shared_bytes, stream, l.cooperative, l.cluster};
    switch (l.kernel) {
        case Kernel::moments:
            return l.wide ? launch(&moments_kernel<T, true>, config, call) : launch(&moments_kernel<T, false>, config, call);
        case Kernel::settle: return l.wide ? launch(&settle_kernel<T, true>, config, call) : launch(&settle_kernel<T, false>, config, call);
        case Kernel::grad_settle:
            return l.wide ? launch(&grad_settle_kernel<T, true>, config, call) : launch(&grad_settle_kernel<T, false>, config, call);
        case Kernel::settle_sets: return launch(&settle_sets_kernel<A>, config, call);
        case Kernel::grad_settle_sets: return launch(&grad_settle_sets_kernel<A>, config, call);
        case Kernel::grad_columns: return launch(&grad_columns_kernel<T>, config, call);
        case Kernel::grad_parameters: return launch(&grad_parameters_kernel<A>, config, call);
        case Kernel::average_running: return launch(&average_running_kernel<A>, config, call);
        case Kernel::count_batch: return launch(&count_batch_kernel<A>, config, call);
        default: break;
    }
    if (l.wide) return l.rows ? launch_with_act<T, true, true>(l, config, call) : launch_with_act<T, true, false>(l, config, call);
    return l.rows ? launch_with_act<T, false, true>(l, config, call) : launch_with_act<T, false, false>(l, config, call);
}

}  // namespace normfused
