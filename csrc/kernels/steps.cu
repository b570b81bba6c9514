// From a step to its launches: plans, lays out the workspace, and launches. Host code only.
#include "steps.h"

#include <cstdio>

#include "kernels.cuh"
#include "plan.h"

namespace normfused {

extern template int launch_kernel<float>(const Launch&, const Call&, void*);
extern template int launch_kernel<__half>(const Launch&, const Call&, void*);
extern template int launch_kernel<__nv_bfloat16>(const Launch&, const Call&, void*);
extern template int launch_kernel<double>(const Launch&, const Call&, void*);

namespace {

int launch_typed(const Launch& l, const Call& call, void* stream) {
    switch (call.problem.type) {
        case Type::float32: return launch_kernel<float>(l, call, stream);
        case Type::float16: return launch_kernel<__half>(l, call, stream);
        case Type::bfloat16: return launch_kernel<__nv_bfloat16>(l, call, stream);
        default: return launch_kernel<double>(l, call, stream);
    }
}

constexpr int group_words = 1;  // behind the word of the last block to finish

// Numbers of the accumulator's type that a step needs beside its outputs
struct Workspace {
    int64_t partial = 0, pairs = 0, channel_sums = 0, shared_act = 0, variances = 0, set_coefficients = 0;
    uint32_t arrivals = 0;  // words: the one of the last block first, then one per group
    int64_t entries = 0;
    bool finish = false, parameters_launch = false;

    int64_t numbers() const { return partial + pairs + channel_sums + shared_act + variances + set_coefficients; }
};

bool has(const Parameter& p) { return p.data != nullptr; }
bool shared(const Parameter& p) { return p.data != nullptr && !p.per_channel; }

Workspace workspace(const Problem& p, Step step, const Needs& needs, const Plan& plan, bool pool) {
    const Walk& w = plan.walk;
    Workspace s;
    const bool forward = step == Step::norm_act || step == Step::moments;
    const int64_t columns = plan.wide ? w.outers : w.outers * w.cols,
                  partial = (forward || p.rule == Rule::batch_instance ? 4 : 3) * w.chunks * columns;
    if (step == Step::moments || step == Step::grad_moments) s.partial = partial;
    if (step == Step::grad_moments) s.channel_sums = p.N * p.C;  // of act_weight
    if (step == Step::norm_act) {
        if (plan.route == Route::two_pass) s.partial = partial;
        if (p.scope == Scope::sample_group && p.batch_statistics) s.variances = p.sets();
        if (plan.route == Route::single_pass && p.scope == Scope::channel && p.cumulative) s.arrivals = 1;
    }
    if (step == Step::norm_act_backward && plan.route != Route::apply_only) {
        const bool rows_of_channels = plan.wide && plan.rows && !w.one_channel;
        s.shared_act = p.scope == Scope::channel ? p.C : 0;  // a parameter that all channels share
        if (plan.route == Route::two_pass) {
            if (rows_of_channels) {
                s.entries = w.vector_chunks * p.N;
                s.channel_sums = 3 * s.entries * p.C;
            } else {
                s.partial = partial;
                if (p.scope == Scope::sample_group) {
                    s.entries = plan.wide ? p.N : w.chunks * p.N;  // narrow: the partials themselves
                    if (plan.wide) s.channel_sums = 3 * s.entries * p.C;
                }
            }
            if (plan.settles) s.set_coefficients = 2 * p.sets();
            s.parameters_launch = needs.parameters && p.scope == Scope::sample_group;
        } else if (needs.parameters && p.scope != Scope::channel) {
            s.entries = p.scope == Scope::sample_group ? p.N * (rows_of_channels ? w.vector_chunks : 1)
                        : plan.columns_pass            ? plan.columns_walk.chunks
                                                       : plan.blocks;
            s.channel_sums = 3 * s.entries * p.C;
            // one block can sum so many numbers in less time than another launch takes (unmeasured)
            s.finish = pool && !plan.columns_pass && s.entries * p.C <= 16384;
            s.arrivals = s.finish ? 1 : 0;
            s.parameters_launch = !s.finish;
        }
        if (p.scope == Scope::channel) s.entries = 1;
    }
    if (plan.owner == Owner::group) {
        s.partial = plan.wide ? partial : 4 * w.chunks * columns;  // owners.cuh
        s.pairs = plan.wide ? 0 : 2 * p.sets();
        s.arrivals = group_words + uint32_t(plan.groups);
    }
    return s;
}

bool aligned_16(const Arguments& a) {
    for (const void* p : {a.x, a.residual, (const void*)a.y, (const void*)a.h, (const void*)a.shifted, a.dy, a.dh, a.dshifted, a.against,
                          (const void*)a.dx, (const void*)a.dresidual})
        if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
    return true;
}

void declare_parameter(const char* name, const Parameter& p, int64_t C, bool writable) {
    if (p.data) declare(name, p.data, (p.per_channel ? C : 1) * size_of(p.type), writable);
}

// Tells the emulation what every pointer is; nothing on a device
void declare_all(const Problem& p, Step step, const Arguments& a, size_t scratch_bytes, uint32_t arrivals) {
    const int64_t bytes = p.elements() * size_of(p.type), wide = p.type == Type::float64 ? 8 : 4;
    const bool backward = step == Step::norm_act_backward || step == Step::grad_moments || step == Step::grad_apply;
    forget_all();
    declare("x", a.x, bytes, false);
    declare("residual", a.residual, bytes, false);
    declare("y", a.y, bytes, true);
    declare("h", a.h, bytes, true);
    declare("mask", a.mask, mask_bytes(p), !backward);
    declare("mean", a.mean, p.means() * wide, !backward);
    declare("rstd", a.rstd, p.rstds() * wide, !backward);
    declare_parameter("weight", a.weight, p.C, false);
    declare_parameter("bias", a.bias, p.C, false);
    declare_parameter("act_weight", a.act_weight, p.C, false);
    declare_parameter("rule_weight", a.rule_weight, p.C, false);
    declare_parameter("running_mean", a.running_mean, p.C, p.batch_statistics);
    declare_parameter("running_var", a.running_var, p.C, p.batch_statistics);
    declare_parameter("r_max", a.r_max, p.C, false);
    declare_parameter("d_max", a.d_max, p.C, false);
    declare("num_batches_tracked", a.counter, 8, true);
    for (const auto& t : {std::pair<const char*, const void*>{"scale", a.scale},
                          {"shift", a.shift},
                          {"shift_after", a.shift_after},
                          {"dz_scale", a.dz_scale},
                          {"q", a.q},
                          {"r", a.r}})
        declare(t.first, t.second, p.sets() * wide, false);
    declare("residual_scale", a.residual_scale, wide, false);
    declare("shifted", a.shifted, bytes, true);
    declare("dy", a.dy, bytes, false);
    declare("dshifted", a.dshifted, bytes, false);
    if (a.against != a.residual) declare("against", a.against, bytes, false);
    declare("dh", a.dh, bytes, false);
    declare("dx", a.dx, bytes, true);
    declare("dresidual", a.dresidual, bytes, true);
    declare_parameter("dweight", a.dweight, p.C, true);
    declare_parameter("dbias", a.dbias, p.C, true);
    declare_parameter("dact_weight", a.dact_weight, p.C, true);
    declare_parameter("drule_weight", a.drule_weight, p.C, true);
    declare("sum_dz", a.sum_dz, p.sets() * wide, true);
    declare("sum_dz_xc", a.sum_dz_xc, p.sets() * wide, true);
    declare("scratch", a.scratch, int64_t(scratch_bytes), true);
    declare("arrivals", a.arrivals, int64_t(arrivals) * 4, true);
}

int forced_route = -1;  // by the tests

class Run {
   public:
    Run(const Problem& p, const Needs& needs, const Plan& plan, const Workspace& space, const Arguments& args, void* stream)
        : problem(p),
          plan(plan),
          space(space),
          stream(stream),
          at(static_cast<char*>(args.scratch)),
          wide(p.type == Type::float64 ? 8 : 4) {
        call.problem = p;
        if (p.act == Act::relu) call.problem.p0 = 0;  // leaky_relu's slope
        call.p0 = float(call.problem.p0);
        call.p1 = float(p.p1);
        call.walk = plan.walk;
        call.walk.aligned = call.walk.aligned && aligned_16(args);
        call.tensors = args;
        call.needs = needs;
        call.count = p.count();
        call.per_element = 1.0 / double(call.count);
        call.scratch_offset = plan.scratch_offset;
        call.columns_offset = plan.columns_offset;
        call.sums_offset = plan.sums_offset;
        call.wide = plan.wide;
        call.owner = plan.owner;
        call.exchange_offset = plan.exchange_offset;
        call.group_words = group_words;
        const int batches = int(planning::ceil_div(plan.walk.steps, plan.batch));
        call.streams = plan.route == Route::single_pass && plan.wide == plan.rows && plan.walk.resident < batches - 1;
        if (plan.owner == Owner::group) {
            call.partial = take(space.partial);
            call.partials = plan.walk.chunks;
            for (void*& numbers : call.pairs) numbers = take(space.pairs / 2);
        }
    }

    void* take(int64_t numbers) {
        if (numbers == 0) return nullptr;
        void* taken = at;
        at += numbers * wide;
        return taken;
    }
    void take_channel_sums(int64_t entries) {
        for (void*& sums : call.channel_sums) sums = take(entries * problem.C);
        call.entries = entries;
    }
    void no_channel_sums() {
        for (void*& sums : call.channel_sums) sums = nullptr;
    }

    int operator()(Kernel kernel, const char* name) {
        const bool single = kernel == Kernel::single_pass || kernel == Kernel::grad_single_pass;
        return launch_typed(
            {kernel, plan.wide, plan.rows, uint32_t(plan.blocks), uint32_t(plan.threads), uint32_t(plan.shared_bytes), name,
             single && plan.owner == Owner::group, single && plan.owner == Owner::cluster ? uint32_t(plan.walk.chunks) : 1u},
            call, stream);
    }
    int small(Kernel kernel, const char* name, int64_t blocks, int threads) {
        const int offset = call.scratch_offset;
        call.scratch_offset = 0;
        const int status = launch_typed(
            {kernel, plan.wide, plan.rows, uint32_t(blocks), uint32_t(threads), uint32_t(4 * std::max(threads, 32) * wide), name}, call,
            stream);
        call.scratch_offset = offset;
        return status;
    }
    // Of all chunks of a slab one block settles them
    int settle(Kernel kernel, const char* name) {
        const Walk walk = call.walk;
        call.walk.chunks = call.walk.vector_chunks = call.walk.pieces = 1;
        const int status = launch_typed(
            {kernel, plan.wide, plan.rows, uint32_t(plan.blocks / walk.chunks), uint32_t(plan.threads), uint32_t(plan.shared_bytes), name},
            call, stream);
        call.walk = walk;
        return status;
    }
    int parameters() {
        if (!has(call.tensors.dweight) && !has(call.tensors.dbias) && !has(call.tensors.dact_weight) && !has(call.tensors.drule_weight))
            return ok;
        return small(Kernel::grad_parameters, "grad_parameters", planning::ceil_div(problem.C, 32), 256);
    }

    int forward();
    int backward();
    int slice_moments();
    int slice_gradients();

    const Problem& problem;
    const Plan& plan;
    const Workspace& space;
    void* stream;
    char* at;
    int wide;
    Call call = {};
};

int Run::forward() {
    const bool tracked = has(call.tensors.running_mean) || has(call.tensors.running_var) || call.tensors.counter;
    call.variances = tracked ? take(space.variances) : nullptr;
    int status = ok;
    if (plan.route == Route::apply_only) return (*this)(Kernel::apply, "apply");
    if (plan.route == Route::single_pass) {
        status = (*this)(Kernel::single_pass, "single_pass");
    } else {
        call.partial = take(space.partial);
        call.partials = plan.walk.chunks;
        status = (*this)(Kernel::moments, "moments");
        if (status == ok && plan.settles) {
            status = small(Kernel::settle_sets, "settle_sets", problem.sets(), 256);
            call.settled = true;
        }
        if (status == ok) status = (*this)(Kernel::apply, "apply");
    }
    if (status == ok && problem.scope == Scope::sample_group && tracked) {
        status = small(Kernel::average_running, "average_running", planning::ceil_div(problem.C, 256), 256);
        if (status == ok && call.tensors.counter) status = small(Kernel::count_batch, "count_batch", 1, 32);
    }
    return status;
}

int Run::backward() {
    const Arguments& t = call.tensors;
    call.scales_by_q = !problem.centred() && problem.batch_statistics && problem.count() == 1;
    if (plan.route == Route::apply_only) return (*this)(Kernel::grad_apply, "grad_apply");
    void* const act_of_channels = take(space.shared_act);
    const bool channel = problem.scope == Scope::channel;
    if (channel && shared(t.dact_weight)) call.channel_sums[sum_act] = act_of_channels;
    int status = ok;
    if (plan.route == Route::single_pass) {
        if (space.channel_sums) take_channel_sums(space.entries);
        if (plan.columns_pass) no_channel_sums();
        call.finish = space.finish;
        status = (*this)(Kernel::grad_single_pass, "grad_single_pass");
        if (status == ok && plan.columns_pass && call.needs.parameters) {
            at -= 3 * space.entries * problem.C * wide;
            take_channel_sums(space.entries);
            const Walk row_walk = call.walk;
            call.walk = plan.columns_walk;
            call.walk.aligned = row_walk.aligned;
            const int lanes = 3 * vector_of(problem.type) * plan.columns_walk.team * plan.columns_walk.teams * wide;
            const int offset = call.scratch_offset;
            call.scratch_offset = 0;
            status = launch_typed({Kernel::grad_columns, false, false, uint32_t(plan.columns_walk.units), uint32_t(plan.columns_threads),
                                   uint32_t(lanes), "grad_columns"},
                                  call, stream);
            call.scratch_offset = offset;
            call.walk = row_walk;
        }
    } else {
        const bool rows_of_channels = plan.wide && plan.rows && !plan.walk.one_channel;
        call.partials = rows_of_channels ? plan.walk.vector_chunks : plan.walk.chunks;
        call.partial = take(space.partial);
        void* const kept_act = call.channel_sums[sum_act];
        if (space.channel_sums) take_channel_sums(space.entries);
        if (!rows_of_channels && !channel) no_channel_sums();
        status = (*this)(Kernel::grad_moments, "grad_moments");
        if (status == ok && plan.settles) {
            void* const q = take(problem.sets());
            void* const r = take(problem.sets());
            call.tensors.q = q;
            call.tensors.r = r;
            status = small(Kernel::grad_settle_sets, "grad_settle_sets", problem.sets(), 256);
        }
        // where the sums of a set are those of one channel, they are merged on the way
        if (!rows_of_channels && !channel && plan.wide) {
            at -= 3 * space.entries * problem.C * wide;
            take_channel_sums(space.entries);
        }
        if (channel) call.channel_sums[sum_act] = kept_act;
        if (status == ok) status = (*this)(Kernel::grad_apply, "grad_apply");
        if (!plan.wide && !channel) {
            for (int i = 0; i < 3; ++i) call.channel_sums[i] = static_cast<char*>(call.partial) + i * space.entries * problem.C * wide;
            call.entries = space.entries;
        }
        call.tensors.q = call.tensors.r = nullptr;
    }
    if (status == ok && channel && shared(t.dact_weight)) {  // dweight and dbias are written
        call.entries = 1;
        call.channel_sums[sum_dz] = call.channel_sums[sum_dz_xc] = nullptr;
        call.tensors.dweight = call.tensors.dbias = call.tensors.drule_weight = Parameter();
        return parameters();
    }
    if (status == ok && space.parameters_launch) status = parameters();
    return status;
}

int Run::slice_moments() {
    call.partial = take(space.partial);
    call.partials = plan.walk.chunks;
    const int status = (*this)(Kernel::moments, "moments");
    return status == ok ? settle(Kernel::settle, "settle") : status;
}

int Run::slice_gradients() {
    call.partial = take(space.partial);
    call.partials = plan.walk.chunks;
    int status = (*this)(Kernel::grad_moments, "grad_moments");
    call.channel_sums[sum_dz] = call.tensors.sum_dz;
    call.channel_sums[sum_dz_xc] = call.tensors.sum_dz_xc;
    call.channel_sums[sum_act] = has(call.tensors.dact_weight) ? take(space.channel_sums) : nullptr;
    if (status == ok) status = settle(Kernel::grad_settle, "grad_settle");
    if (status != ok || !has(call.tensors.dact_weight)) return status;
    call.channel_sums[sum_dz] = call.channel_sums[sum_dz_xc] = nullptr;
    call.entries = problem.N;
    return parameters();
}

}  // namespace

// The route that later plans take where they can: -1 as it is best, 0 single_pass, 1 two_pass, 2 and 3 single_pass by clusters and by
// groups of co-resident blocks. For tests and measurements.
extern "C" __attribute__((visibility("default"))) void normfused_force_route(int route) { forced_route = route; }

int64_t mask_bytes(const Problem& problem) {
    const planning::View view = planning::view_of(problem);
    return problem.masked() ? view.walk.outers * view.walk.rows * view.walk.row_vectors : 0;
}

namespace {
// Where blocks that must run together do not find room together: a launch per pass
Plan instead_of_owners(const Problem& problem, Step step, const Needs& needs, const Limits& limits, bool pool) {
    return choose_plan(problem, step, needs, limits, pool, int(Route::two_pass));
}

int run_plan(const Problem& problem, Step step, const Needs& needs, const Plan& plan, const Arguments& args, bool pool, void* stream) {
    const Workspace space = workspace(problem, step, needs, plan, pool);
    declare_all(problem, step, args, size_t(space.numbers()) * (problem.type == Type::float64 ? 8 : 4), space.arrivals);
    Run run(problem, needs, plan, space, args, stream);
    switch (step) {
        case Step::norm_act: return run.forward();
        case Step::norm_act_backward: return run.backward();
        case Step::moments: return run.slice_moments();
        case Step::apply: return run(Kernel::apply, "apply");
        case Step::grad_moments: return run.slice_gradients();
        case Step::grad_apply: return run(Kernel::grad_apply, "grad_apply");
    }
    return not_supported;
}
}  // namespace

Requirements requirements(const Problem& problem, Step step, const Needs& needs, const Limits& limits, bool pool) {
    const Plan plan = choose_plan(problem, step, needs, limits, pool, forced_route);
    const Workspace space = workspace(problem, step, needs, plan, pool);
    int64_t numbers = space.numbers();
    if (plan.owner != Owner::block) {
        const Plan other = instead_of_owners(problem, step, needs, limits, pool);
        numbers = std::max(numbers, workspace(problem, step, needs, other, pool).numbers());
    }
    return {size_t(numbers) * (problem.type == Type::float64 ? 8 : 4), space.arrivals};
}

int run(const Problem& problem, Step step, const Needs& needs, const Limits& limits, const Arguments& args, void* stream) {
    if (problem.elements() == 0) return ok;
    bool pool = true;
    Plan plan = choose_plan(problem, step, needs, limits, pool, forced_route);
    if (args.arrivals == nullptr && workspace(problem, step, needs, plan, pool).arrivals > 0) {
        pool = false;
        plan = choose_plan(problem, step, needs, limits, pool, forced_route);
    }
    // beyond 2^31 - 1 blocks, or groups among 2^20 channels and more (walk.h): no plan
    if (plan.blocks <= 0 || plan.blocks >= planning::too_many || (!plan.wide && plan.walk.width > 1 && problem.C >= 1 << 20))
        return not_supported;
    const bool by_steps = problem.rule == Rule::batch_instance;  // where no single pass takes it, the caller has another way
    if (by_steps && plan.route != Route::single_pass) return not_supported;
    const int status = run_plan(problem, step, needs, plan, args, pool, stream);
    if (plan.owner == Owner::block || !not_together(status)) return status;
    return by_steps ? not_supported
                    : run_plan(problem, step, needs, instead_of_owners(problem, step, needs, limits, pool), args, pool, stream);
}

int describe(const Problem& problem, Step step, const Needs& needs, const Limits& limits, bool pool, char* text, int size) {
    const Plan plan = choose_plan(problem, step, needs, limits, pool, forced_route);
    const Workspace space = workspace(problem, step, needs, plan, pool);
    // where no single pass takes batch-instance norm, the caller has another way
    const char* const routes[] = {"single_pass", problem.rule == Rule::batch_instance ? "slices" : "two_pass", "apply"};
    const char* const owners[] = {"block", "cluster", "group"};
    return std::snprintf(text, size_t(size),
                         "{\"route\": \"%s\", \"owner\": \"%s\", \"groups\": %d, \"sets\": \"%s\", \"channels\": \"%s\", \"blocks\": %lld, "
                         "\"threads\": %d, \"team\": %d, \"teams\": %d, "
                         "\"steps\": %d, \"batch\": %d, \"resident\": %d, \"spare\": %d, \"slice\": %lld, \"chunks\": %lld, \"pieces\": "
                         "%d, \"shared_bytes\": %d, "
                         "\"scratch_bytes\": %lld, \"arrivals\": %u, \"reads_of_x\": %.6g}",
                         routes[int(plan.route)], owners[int(plan.owner)], plan.groups, plan.wide ? "wide" : "narrow",
                         plan.rows ? "rows" : "columns", (long long)plan.blocks, plan.threads, plan.walk.team, plan.walk.teams,
                         plan.walk.steps, plan.batch, plan.walk.resident, plan.walk.spare, (long long)plan.walk.slice,
                         (long long)plan.walk.chunks, plan.walk.vector_chunks, plan.shared_bytes,
                         (long long)(space.numbers() * (problem.type == Type::float64 ? 8 : 4)), space.arrivals, plan.read_x);
}

}  // namespace normfused
