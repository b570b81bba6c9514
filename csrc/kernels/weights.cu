// From a list of weights to launches: tables of at most ``weights_of_launch`` weights, one after the other. Host code only.
#include "weights.cuh"

#include <algorithm>
#include <string>

namespace normfused {
namespace {

bool aligned(const Weight& weight, int lanes) {
    if (weight.view.B % uint32_t(lanes) != 0) return false;
    for (const void* tensor : weight.tensors)
        if (reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
    return true;
}

enum class Cut { rows, columns, chunks };  // that the blocks of a launch are

uint32_t blocks_of(Cut cut_into, const WeightView& view, uint32_t lanes, uint32_t vector) {
    switch (cut_into) {
        case Cut::rows: return row_blocks(view, lanes);
        case Cut::columns: return column_blocks(view, lanes);
        default: return chunks_of(view, vector);
    }
}

// Numbers of the accumulator's type: t, s, and two arrays of sums which launches read and write in turn
struct WeightScratch {
    int64_t t = 0, s = 0, sums = 0;
    int64_t numbers() const { return t + s + 2 * sums; }
};

WeightScratch scratch_of(WeightStep step, const Weight* weights, int count, Type type) {
    WeightScratch scratch;
    if (step == WeightStep::weight_norm || step == WeightStep::weight_norm_backward) return scratch;
    const uint32_t vector = uint32_t(vector_of(type));
    for (int i = 0; i < count; ++i) {
        const WeightView& view = weights[i].view;
        scratch.t += view.R;
        scratch.s += view.columns();
        uint32_t most = 0;
        for (Cut by : {Cut::rows, Cut::columns, Cut::chunks}) {  // whether tensors will be aligned is not known yet
            most = std::max(most, blocks_of(by, view, 1, vector));
            if (view.B % vector == 0) most = std::max(most, blocks_of(by, view, vector, vector));
        }
        scratch.sums += most;
    }
    if (step == WeightStep::spectral_norm_backward) scratch.t = scratch.s = 0;
    return scratch;
}

// Tells the emulation what every pointer is, tensors as "v0", "v1", ...
void declare_weights(WeightStep step, const Weight* weights, int count, const WeightArguments& args, const WeightScratch& scratch) {
    static const char* const names[4][5] = {
        {"v", "g", "w", "", ""}, {"dw", "v", "g", "dg", "dv"}, {"weight", "u", "v", "w", ""}, {"dw", "weight", "dweight", "", ""}};
    const bool backward = step == WeightStep::weight_norm_backward || step == WeightStep::spectral_norm_backward;
    const int64_t wide = args.type == Type::float64 ? 8 : 4;
    int64_t rows = 0, columns = 0;
    forget_all();
    for (int i = 0; i < count; ++i) {
        const WeightView& view = weights[i].view;
        rows += view.R;
        columns += view.columns();
        for (int j = 0; j < 5; ++j) {
            const std::string name = names[int(step)][j];
            if (name.empty()) continue;
            const bool kept = step == WeightStep::spectral_norm && (name == "u" || name == "v");  // by the parametrization
            const bool per_row = name == "g" || name == "dg" || name == "u", per_column = kept && name == "v";
            const int64_t elements = per_row ? view.R : per_column ? view.columns() : view.numel();
            const bool written = name == "w" || name == "dg" || name == "dv" || name == "dweight" || (kept && args.iterations > 0);
            declare((name + std::to_string(i)).c_str(), weights[i].tensors[j], elements * size_of(args.type), written);
        }
    }
    declare("norms", args.norms, rows * wide, !backward);
    declare("used_u", args.u, rows * wide, !backward);
    declare("used_v", args.v, columns * wide, !backward);
    declare("sigma", args.sigma, count * wide, !backward);
    declare("scratch", args.scratch, scratch.numbers() * wide, true);
}

template <class T> class WeightRun {
   public:
    WeightRun(const WeightArguments& args, const WeightScratch& scratch, void* stream) : stream_(stream) {
        using A = AccumulatorOf<T>;
        A* at = static_cast<A*>(args.scratch);
        call_.eps = args.eps;
        call_.norms = args.norms;
        call_.u = args.u;
        call_.v = args.v;
        call_.sigma = args.sigma;
        call_.t = at;
        call_.s = at + scratch.t;
        call_.read_sums = at + scratch.t + scratch.s;
        call_.write_sums = at + scratch.t + scratch.s + scratch.sums;
    }

    // The next weights; the offsets of rows and columns run on
    void take(const Weight* weights, int first, int count) {
        call_.count = count;
        call_.first_weight = uint32_t(first);
        for (int i = 0; i < count; ++i) {
            const Weight& weight = weights[first + i];
            WeightEntry& e = call_.entries[i];
            std::copy(weight.tensors, weight.tensors + 5, e.tensors);
            e.view = weight.view;
            if (aligned(weight, vector_size<T>)) e.view.period |= aligned_bit;
            e.first = e.sums = 0;
            e.rows = rows_;
            e.columns = columns_;
            rows_ += weight.view.R;
            columns_ += weight.view.columns();
        }
    }

    // A launch may read the sums that the one before it left
    int operator()(void (*kernel)(WeightCall), const char* name, Cut by) {
        uint32_t blocks = 0;
        std::swap(call_.read_sums, call_.write_sums);
        for (int i = 0; i < call_.count; ++i) {
            WeightEntry& e = call_.entries[i];
            e.sums = e.first;
            e.first = blocks;
            WeightView view = e.view;
            view.period = 0;
            blocks += blocks_of(by, view, lanes_of<T>(e), vector_size<T>);
        }
        return launch(kernel, {name, blocks, uint32_t(weight_threads), weight_shared_bytes<T>, stream_}, call_);
    }

    int step(WeightStep step, int iterations) {
        switch (step) {
            case WeightStep::weight_norm: return (*this)(&weight_norm_kernel<T>, "weight_norm", Cut::rows);
            case WeightStep::weight_norm_backward: return (*this)(&weight_norm_backward_kernel<T>, "weight_norm_backward", Cut::rows);
            case WeightStep::spectral_norm_backward: {
                const int status = (*this)(&inner_product_kernel<T>, "inner_product", Cut::chunks);
                return status == ok ? (*this)(&spectral_gradient_kernel<T>, "spectral_gradient", Cut::chunks) : status;
            }
            default: break;
        }
        int status = ok;
        call_.given = 1;
        call_.iterates = iterations > 0;
        for (int i = 0; i < std::max(iterations, 1) && status == ok; ++i) {
            status = (*this)(&matvec_kernel<T>, "matvec", Cut::rows);
            if (status == ok && iterations > 0) status = (*this)(&transposed_matvec_kernel<T>, "transposed_matvec", Cut::columns);
            call_.given = 0;
        }
        return status == ok ? (*this)(&scale_kernel<T>, "scale", Cut::chunks) : status;
    }

   private:
    WeightCall call_ = {};
    uint32_t rows_ = 0, columns_ = 0;
    void* stream_;
};

template <class T>
int run_typed(WeightStep step, const Weight* weights, int count, const WeightArguments& args, const WeightScratch& scratch, void* stream) {
    WeightRun<T> run(args, scratch, stream);
    int status = ok;
    for (int first = 0; first < count && status == ok; first += weights_of_launch) {
        run.take(weights, first, std::min(weights_of_launch, count - first));
        status = run.step(step, args.iterations);
    }
    return status;
}

}  // namespace

size_t weight_scratch_bytes(WeightStep step, const Weight* weights, int count, Type type) {
    return size_t(scratch_of(step, weights, count, type).numbers()) * (type == Type::float64 ? 8 : 4);
}

int run_weights(WeightStep step, const Weight* weights, int count, const WeightArguments& args, void* stream) {
    const WeightScratch scratch = scratch_of(step, weights, count, args.type);
    NF_EMULATED(declare_weights(step, weights, count, args, scratch);)
    switch (args.type) {
        case Type::float32: return run_typed<float>(step, weights, count, args, scratch, stream);
        case Type::float16: return run_typed<__half>(step, weights, count, args, scratch, stream);
        case Type::bfloat16: return run_typed<__nv_bfloat16>(step, weights, count, args, scratch, stream);
        default: return run_typed<double>(step, weights, count, args, scratch, stream);
    }
}

}  // namespace normfused
