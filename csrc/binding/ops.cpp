// The kernels as operators of torch, through LibTorch's stable ABI: one binary serves every torch from 2.10 on, and any Python.
//
// An operator takes checked, canonical tensors (normfused/backends/__init__.py), allocates what it returns, asks the kernels what they
// need beside (scratch, arrival words), and runs them on the current stream. Autograd and fake kernels live in normfused/ops.py.
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "../kernels/steps.h"
#include "code.h"
#include "runtime.h"
#include "tensors.h"

namespace normfused {
namespace {

// ------------------------------------------------------------------------------------------------------------- a call
// One operator's call: the problem that x and the code describe, checks of what is given, outputs, and the launch.
class Call {
   public:
    Call(const char* op, const Tensor& x, int64_t code, int64_t groups) : op_(op), x_(x), place_(place_of(x)) {
        require(is_code(code), op, ": code must be packed by normfused.backends.cuda._load.pack_code, got ", code);
        unpack(code, problem);
        problem.type = type_of(x, op, "x");
        problem.groups = groups;
        int64_t* sizes = nullptr;
        int64_t* strides = nullptr;
        check(aoti_torch_get_dim(x.get(), &dim_));
        require(dim_ >= 2, op, ": x must be (N, C, *), got ", dim_, " dimensions");
        check(aoti_torch_get_sizes(x.get(), &sizes));
        check(aoti_torch_get_strides(x.get(), &strides));
        sizes_ = sizes;
        strides_ = strides;
        problem.N = sizes[0];
        problem.C = sizes[1];
        problem.S = 1;
        for (int64_t i = 2; i < dim_; ++i) problem.S *= sizes[i];
        wide_ = torch_dtype(problem.type == Type::float64 ? Type::float64 : Type::float32);
    }

    Problem problem;

    // x, or a tensor of x's size and type; null where absent
    void* like_x(const Tensor& tensor, const char* name) const {
        require(tensor.numel() == problem.elements() && dtype_of(tensor) == torch_dtype(problem.type), op_, ": ", name, " must have x's ",
                problem.elements(), " elements of ", name_of(x_), ", got ", tensor.numel(), " of ", name_of(tensor));
        return here(tensor, name);
    }
    void* like_x(const Optional& tensor, const char* name) const { return tensor ? like_x(*tensor, name) : nullptr; }

    // The accumulator's type, `count` values
    void* wide(const Tensor& tensor, int64_t count, const char* name) const {
        require(tensor.numel() == count && dtype_of(tensor) == wide_, op_, ": ", name, " must have ", count, " values of ",
                problem.type == Type::float64 ? "Double" : "Float", ", got ", tensor.numel(), " of ", name_of(tensor));
        return here(tensor, name);
    }

    void* residual_scale(const Optional& tensor) const { return tensor ? wide(*tensor, 1, "residual_scale") : nullptr; }

    Parameter parameter(const Optional& tensor, const char* name) const {
        if (!tensor) return {};
        const int64_t count = tensor->numel();
        require(count == 1 || count == problem.C, op_, ": ", name, " must have 1 or ", problem.C, " elements, got ", count);
        return {here(*tensor, name), type_of(*tensor, op_, name), count == problem.C};
    }

    Parameter scalar(const Optional& tensor, const char* name) const {
        require(!tensor || tensor->numel() == 1, op_, ": ", name, " must have 1 element, got ", tensor ? tensor->numel() : 0);
        Parameter found = parameter(tensor, name);
        found.per_channel = false;
        return found;
    }

    // A buffer that is given with no elements is a norm without running statistics
    Parameter buffer(const Optional& tensor, const char* name) const {
        return tensor && tensor->numel() > 0 ? parameter(tensor, name) : Parameter{};
    }

    int64_t* counter(const Optional& tensor) const {
        if (!tensor || tensor->numel() == 0) return nullptr;
        require(tensor->numel() == 1 && dtype_of(*tensor) == aoti_torch_dtype_int64(), op_,
                ": num_batches_tracked must be one value of Long, got ", tensor->numel(), " of ", name_of(*tensor));
        return static_cast<int64_t*>(here(*tensor, "num_batches_tracked"));
    }

    uint8_t* mask(const Optional& tensor) const {
        if (!tensor) return nullptr;
        require(dtype_of(*tensor) == aoti_torch_dtype_uint8() && tensor->numel() == mask_bytes(problem), op_, ": mask must have ",
                mask_bytes(problem), " values of Byte, got ", tensor->numel(), " of ", name_of(*tensor));
        return static_cast<uint8_t*>(here(*tensor, "mask"));
    }

    Tensor nothing() const { return flat(0, torch_dtype(problem.type)); }
    Tensor flat(int64_t count, int32_t dtype) const {
        const int64_t stride = 1;
        return empty(&count, &stride, 1, dtype, place_);
    }
    Tensor new_x() const { return empty(sizes_, strides_, dim_, torch_dtype(problem.type), place_); }
    Tensor new_mask() const { return flat(mask_bytes(problem), aoti_torch_dtype_uint8()); }
    Tensor new_moments() const {
        if (problem.scope == Scope::channel) return flat(problem.C, wide_);
        const int64_t sizes[] = {problem.N, problem.scope == Scope::sample_group ? problem.groups : problem.S};
        return two(sizes[0], sizes[1]);
    }
    Tensor new_slices() const { return two(problem.N, problem.C); }
    Tensor new_means() const { return problem.rule == Rule::batch_instance ? two(1 + problem.N, problem.C) : new_moments(); }
    Tensor new_rstds() const { return problem.rule == Rule::renorm ? two(3, problem.C) : new_means(); }

    // A gradient of the parameter's shape and type, and where the kernels write it
    Tensor new_gradient(const Optional& parameter, bool needed, Parameter& gradient, const char* name) const {
        if (!needed || !parameter) return nothing();
        int64_t dim = 0;
        int64_t* sizes = nullptr;
        int64_t* strides = nullptr;
        check(aoti_torch_get_dim(parameter->get(), &dim));
        check(aoti_torch_get_sizes(parameter->get(), &sizes));
        check(aoti_torch_get_strides(parameter->get(), &strides));
        Tensor made = empty(sizes, strides, dim, dtype_of(*parameter), place_);
        gradient = this->parameter(made, name);
        if (problem.elements() == 0) check(aoti_torch_zero_(made.get()));  // no launch will write it
        return made;
    }

    // false: no plan takes the call, and nothing was done. Only batch-instance norm has another way: the steps
    bool run(Step step, const Needs& needs, Arguments& args) {
        std::optional<torch::stable::accelerator::DeviceGuard> guard;
        if (!is_current(place_.index)) guard.emplace(place_.index);
        int status = ok;
        Device* device = device_at(place_.index, status);
        require(device != nullptr, op_, ": device ", place_.index, " does not answer: ", error_string(status));
        void* stream = current_stream(place_.index);
        const Limits limits = limits_now(*device);
        Requirements needed = requirements(problem, step, needs, limits, true);
        if (needed.arrivals > 0) {
            args.arrivals = take_arrivals(*device, stream, needed.arrivals);
            if (args.arrivals == nullptr) needed = requirements(problem, step, needs, limits, false);
        }
        std::optional<Tensor> scratch;  // the caching allocator keeps it for this stream's later work
        if (needed.scratch_bytes > 0) {
            scratch = flat(static_cast<int64_t>(needed.scratch_bytes), aoti_torch_dtype_uint8());
            args.scratch = scratch->data_ptr();
        }
        status = normfused::run(problem, step, needs, limits, args, stream);
        if (status == not_supported && problem.rule == Rule::batch_instance) return false;
        require(status == ok, op_, ": ", error_string(status));
        return true;
    }

   private:
    Tensor two(int64_t rows, int64_t columns) const {
        const int64_t sizes[] = {rows, columns};
        const int64_t strides[] = {columns, 1};
        return empty(sizes, strides, 2, wide_, place_);
    }

    void* here(const Tensor& tensor, const char* name) const {
        require(place_of(tensor) == place_, op_, ": ", name, " must be on x's device (index ", place_.index, "), got index ",
                place_of(tensor).index, place_of(tensor).type == place_.type ? "" : " of another type");
        void* data = tensor.data_ptr();
        require(data != nullptr || tensor.numel() == 0, op_, ": ", name, " has no memory");
        return data;
    }

    const char* op_;
    const Tensor& x_;
    Place place_;
    int64_t dim_ = 0;
    const int64_t* sizes_ = nullptr;
    const int64_t* strides_ = nullptr;
    int32_t wide_ = 0;
};

Needs needs_of(int64_t code) {
    return {(code & NeedsCode::dx) != 0, (code & NeedsCode::dresidual) != 0, (code & NeedsCode::parameters) != 0};
}

// ---------------------------------------------------------------------------------------------------------- operators
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Four norm_act(const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias, const Optional& act_weight,
              const Optional& rule_weight, const Optional& running_mean, const Optional& running_var, const Optional& num_batches_tracked,
              int64_t code, int64_t groups, double eps, double momentum, double p0, double p1, const Optional& r_max,
              const Optional& d_max) {
    Call call("norm_act", x, code, groups);
    Problem& p = call.problem;
    p.eps = eps;
    p.momentum = momentum;
    p.p0 = p0;
    p.p1 = p1;
    const bool has_mean = p.centred() || !p.batch_statistics;
    Tensor y = call.new_x();
    Tensor mean = has_mean ? call.new_means() : call.flat(0, p.type == Type::float64 ? torch_dtype(p.type) : torch_dtype(Type::float32));
    Tensor rstd = call.new_rstds();
    require(p.scope == Scope::channel || p.rule <= Rule::rms, "norm_act: rules mean_only, renorm and batch_instance are of scope channel");
    require(p.rule != Rule::renorm || (running_mean && running_var && r_max && d_max && p.batch_statistics),
            "norm_act: rule renorm needs running statistics, r_max, d_max and the statistics of the batch");
    require(p.rule != Rule::batch_instance || rule_weight, "norm_act: rule batch_instance needs a gate (rule_weight)");
    const bool pre_norm = p.residual_mode == ResidualMode::pre_norm;
    Tensor extra = pre_norm ? call.new_x() : p.masked() ? call.new_mask() : call.nothing();
    Arguments args;
    args.x = call.like_x(x, "x");
    args.residual = call.like_x(residual, "residual");
    args.y = y.data_ptr();
    args.h = pre_norm ? extra.data_ptr() : nullptr;
    args.mask = p.masked() ? static_cast<uint8_t*>(extra.data_ptr()) : nullptr;
    args.mean = has_mean ? mean.data_ptr() : nullptr;
    args.rstd = rstd.data_ptr();
    args.weight = call.parameter(weight, "weight");
    args.bias = call.parameter(bias, "bias");
    args.act_weight = call.parameter(act_weight, "act_weight");
    args.rule_weight = call.parameter(rule_weight, "rule_weight");
    args.running_mean = call.buffer(running_mean, "running_mean");
    args.running_var = call.buffer(running_var, "running_var");
    args.counter = call.counter(num_batches_tracked);
    args.r_max = call.scalar(r_max, "r_max");
    args.d_max = call.scalar(d_max, "d_max");
    if (!call.run(Step::norm_act, {}, args)) return {call.nothing(), call.nothing(), call.nothing(), call.nothing()};
    return {std::move(y), std::move(mean), std::move(rstd), std::move(extra)};
}

Six norm_act_backward(const Tensor& dy, const Optional& dh, const Tensor& x, const Optional& residual, const Optional& mask,
                      const Optional& weight, const Optional& bias, const Optional& act_weight, const Optional& rule_weight,
                      const Tensor& mean, const Tensor& rstd, int64_t code, int64_t groups, double eps, double p0, double p1,
                      int64_t needs_code) {
    Call call("norm_act_backward", x, code, groups);
    Problem& p = call.problem;
    p.eps = eps;
    p.p0 = p0;
    p.p1 = p1;
    const Needs needs = needs_of(needs_code);
    Tensor dx = needs.dx ? call.new_x() : call.nothing();
    Tensor dresidual = needs.dresidual ? call.new_x() : call.nothing();
    Arguments args;
    args.dy = call.like_x(dy, "dy");
    args.dh = call.like_x(dh, "dh");
    args.x = call.like_x(x, "x");
    args.residual = call.like_x(residual, "residual");
    args.mask = call.mask(mask);
    args.weight = call.parameter(weight, "weight");
    args.bias = call.parameter(bias, "bias");
    args.act_weight = call.parameter(act_weight, "act_weight");
    args.rule_weight = call.parameter(rule_weight, "rule_weight");
    args.mean = mean.numel() > 0 ? call.wide(mean, p.means(), "mean") : nullptr;
    args.rstd = call.wide(rstd, p.rstds(), "rstd");
    args.dx = needs.dx ? dx.data_ptr() : nullptr;
    args.dresidual = needs.dresidual ? dresidual.data_ptr() : nullptr;
    Tensor dweight = call.new_gradient(weight, needs.parameters, args.dweight, "dweight");
    Tensor dbias = call.new_gradient(bias, needs.parameters, args.dbias, "dbias");
    Tensor dact_weight = call.new_gradient(act_weight, needs.parameters, args.dact_weight, "dact_weight");
    Tensor drule_weight = call.new_gradient(rule_weight, needs.parameters, args.drule_weight, "drule_weight");
    if (!call.run(Step::norm_act_backward, needs, args))
        return {call.nothing(), call.nothing(), call.nothing(), call.nothing(), call.nothing(), call.nothing()};
    return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias), std::move(dact_weight), std::move(drule_weight)};
}

// The steps of rules that are written in PyTorch: one set per (n, c); z is recomputed from the residual, there is no mask
Two moments(const Tensor& x, int64_t code) {
    Call call("moments", x, code, x.size(1));
    Tensor mean = call.new_slices();
    Tensor var = call.new_slices();
    Arguments args;
    args.x = call.like_x(x, "x");
    args.mean = mean.data_ptr();
    args.rstd = var.data_ptr();
    call.run(Step::moments, {}, args);
    return {std::move(mean), std::move(var)};
}

Two apply(const Tensor& x, const Optional& residual, const Tensor& scale, const Tensor& shift, const Optional& act_weight,
          const Optional& residual_scale, const Optional& shift_after, int64_t code, double p0, double p1, bool need_y) {
    Call call("apply", x, code, x.size(1));
    Problem& p = call.problem;
    p.p0 = p0;
    p.p1 = p1;
    require(need_y || shift_after.has_value(), "apply: shift_after must be given where y is not needed, got none");
    Tensor y = need_y ? call.new_x() : call.nothing();
    Tensor shifted = shift_after ? call.new_x() : call.nothing();
    Arguments args;
    args.x = call.like_x(x, "x");
    args.residual = call.like_x(residual, "residual");
    args.scale = call.wide(scale, p.N * p.C, "scale");
    args.shift = call.wide(shift, p.N * p.C, "shift");
    args.act_weight = call.parameter(act_weight, "act_weight");
    args.residual_scale = call.residual_scale(residual_scale);
    args.y = need_y ? y.data_ptr() : nullptr;
    if (shift_after) {
        args.shift_after = call.wide(*shift_after, p.N * p.C, "shift_after");
        args.shifted = shifted.data_ptr();
    }
    call.run(Step::apply, {}, args);
    return {std::move(y), std::move(shifted)};
}

// What both gradient steps read
Arguments gradient_arguments(const Call& call, const Tensor& dy, const Tensor& x, const Optional& residual, const Tensor& mean,
                             const Tensor& scale, const Tensor& shift, const Optional& act_weight, const Optional& residual_scale,
                             const Optional& dshifted) {
    const int64_t slices = call.problem.N * call.problem.C;
    Arguments args;
    args.dy = call.like_x(dy, "dy");
    args.x = call.like_x(x, "x");
    args.residual = call.like_x(residual, "residual");
    args.mean = call.wide(mean, slices, "mean");
    args.scale = call.wide(scale, slices, "scale");
    args.shift = call.wide(shift, slices, "shift");
    args.act_weight = call.parameter(act_weight, "act_weight");
    args.residual_scale = call.residual_scale(residual_scale);
    args.dshifted = call.like_x(dshifted, "dshifted");
    return args;
}

Three grad_moments(const Tensor& dy, const Tensor& x, const Optional& residual, const Tensor& mean, const Tensor& scale,
                   const Tensor& shift, const Optional& act_weight, const Optional& residual_scale, const Optional& dshifted,
                   const Optional& against, int64_t code, double p0, double p1) {
    Call call("grad_moments", x, code, x.size(1));
    call.problem.p0 = p0;
    call.problem.p1 = p1;
    Arguments args = gradient_arguments(call, dy, x, residual, mean, scale, shift, act_weight, residual_scale, dshifted);
    args.against = call.like_x(against, "against");
    require(!args.against || !args.residual || args.against == args.residual,
            "grad_moments: against must be the residual that z is recomputed from, got another tensor");
    Tensor sum_dz = call.new_slices();
    Tensor sum_dz_xc = call.new_slices();
    args.sum_dz = sum_dz.data_ptr();
    args.sum_dz_xc = sum_dz_xc.data_ptr();
    Tensor dact_weight = call.new_gradient(act_weight, true, args.dact_weight, "dact_weight");
    call.run(Step::grad_moments, {false, false, true}, args);
    return {std::move(sum_dz), std::move(sum_dz_xc), std::move(dact_weight)};
}

Two grad_apply(const Tensor& dy, const Tensor& x, const Optional& residual, const Tensor& mean, const Tensor& scale, const Tensor& shift,
               const Optional& act_weight, const Tensor& dz_scale, const Tensor& q, const Tensor& r, const Optional& residual_scale,
               const Optional& dshifted, int64_t code, double p0, double p1, int64_t needs_code) {
    Call call("grad_apply", x, code, x.size(1));
    Problem& p = call.problem;
    p.p0 = p0;
    p.p1 = p1;
    const Needs needs{(needs_code & NeedsCode::dx) != 0, (needs_code & NeedsCode::dresidual) != 0, false};
    Arguments args = gradient_arguments(call, dy, x, residual, mean, scale, shift, act_weight, residual_scale, dshifted);
    args.dz_scale = call.wide(dz_scale, p.N * p.C, "dz_scale");
    args.q = call.wide(q, p.N * p.C, "q");
    args.r = call.wide(r, p.N * p.C, "r");
    Tensor dx = needs.dx ? call.new_x() : call.nothing();
    Tensor dresidual = needs.dresidual ? call.new_x() : call.nothing();
    args.dx = needs.dx ? dx.data_ptr() : nullptr;
    args.dresidual = needs.dresidual ? dresidual.data_ptr() : nullptr;
    call.run(Step::grad_apply, needs, args);
    return {std::move(dx), std::move(dresidual)};
}

void set_spare_processors(int64_t count) { spare_processors(static_cast<int>(count)); }

#ifdef NF_EMULATION
void set_limits(int64_t processors, int64_t shared_bytes_per_block, int64_t shared_bytes_per_processor, int64_t threads_per_processor,
                int64_t largest_cluster, int64_t spare_processors, bool pool) {
    pretend({static_cast<int>(processors), static_cast<int>(shared_bytes_per_block), static_cast<int>(shared_bytes_per_processor),
             static_cast<int>(threads_per_processor), static_cast<int>(largest_cluster), static_cast<int>(spare_processors)},
            pool);
}
#endif

}  // namespace
}  // namespace normfused

NF_LIBRARY(NF_NAMESPACE, library) {
    library.def(
        "norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? act_weight, Tensor? rule_weight,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int code, int groups, float eps,"
        " float momentum, float p0, float p1, Tensor? r_max=None, Tensor? d_max=None)"
        " -> (Tensor y, Tensor mean, Tensor rstd, Tensor extra)");
    library.def(
        "norm_act_backward(Tensor dy, Tensor? dh, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias,"
        " Tensor? act_weight, Tensor? rule_weight, Tensor mean, Tensor rstd, int code, int groups, float eps, float p0, float p1,"
        " int needs) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dact_weight, Tensor drule_weight)");
    library.def("moments(Tensor x, int code) -> (Tensor mean, Tensor var)");
    library.def(
        "apply(Tensor x, Tensor? residual, Tensor scale, Tensor shift, Tensor? act_weight, Tensor? residual_scale, Tensor? shift_after,"
        " int code, float p0, float p1, bool need_y) -> (Tensor y, Tensor shifted)");
    library.def(
        "grad_moments(Tensor dy, Tensor x, Tensor? residual, Tensor mean, Tensor scale, Tensor shift, Tensor? act_weight,"
        " Tensor? residual_scale, Tensor? dshifted, Tensor? against, int code, float p0, float p1)"
        " -> (Tensor sum_dz, Tensor sum_dz_xc, Tensor dact_weight)");
    library.def(
        "grad_apply(Tensor dy, Tensor x, Tensor? residual, Tensor mean, Tensor scale, Tensor shift, Tensor? act_weight,"
        " Tensor dz_scale, Tensor q, Tensor r, Tensor? residual_scale, Tensor? dshifted, int code, float p0, float p1, int needs)"
        " -> (Tensor dx, Tensor dresidual)");
    library.def("set_spare_processors(int count) -> ()");
#ifdef NF_EMULATION
    library.def(
        "set_limits(int processors, int shared_bytes_per_block, int shared_bytes_per_processor, int threads_per_processor,"
        " int largest_cluster=8, int spare_processors=0, bool pool=True) -> ()");
#endif
}

NF_IMPLEMENTATION(NF_NAMESPACE, NF_KEY, library) {
    library.impl("norm_act", TORCH_BOX(&normfused::norm_act));
    library.impl("norm_act_backward", TORCH_BOX(&normfused::norm_act_backward));
    library.impl("moments", TORCH_BOX(&normfused::moments));
    library.impl("apply", TORCH_BOX(&normfused::apply));
    library.impl("grad_moments", TORCH_BOX(&normfused::grad_moments));
    library.impl("grad_apply", TORCH_BOX(&normfused::grad_apply));
}

NF_IMPLEMENTATION(NF_NAMESPACE, CompositeExplicitAutograd, library) {
    library.impl("set_spare_processors", TORCH_BOX(&normfused::set_spare_processors));
#ifdef NF_EMULATION
    library.impl("set_limits", TORCH_BOX(&normfused::set_limits));
#endif
}
