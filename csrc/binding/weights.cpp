// Weight norm and spectral norm of many weights as operators (csrc/kernels/weights.h), through LibTorch's stable ABI like ops.cpp.
//
// ``views`` has four numbers a weight: A, R, B, period. Tensors are dense and lie as their weight does (normfused/backends/weights.py).
#include <torch/csrc/stable/accelerator.h>

#include <tuple>
#include <vector>

#include "../kernels/weights.h"
#include "runtime.h"
#include "tensors.h"

namespace normfused {
namespace {

using Tensors = std::vector<Tensor>;

// One operator's call: checks, outputs, and the launches
class WeightsCall {
   public:
    WeightsCall(const char* op, const Tensors& weights, const std::vector<int64_t>& views) : op_(op), weights_(weights) {
        require(!weights.empty(), op, ": at least one weight must be given, got none");
        require(views.size() == 4 * weights.size(), op, ": views must have ", 4 * weights.size(), " numbers, got ", views.size());
        place_ = place_of(weights[0]);
        arguments.type = type_of(weights[0], op, "a weight");
        wide_ = torch_dtype(arguments.type == Type::float64 ? Type::float64 : Type::float32);
        list_.resize(weights.size());
        for (size_t i = 0; i < weights.size(); ++i) {
            const int64_t* four = views.data() + 4 * i;
            for (int j = 0; j < 4; ++j)
                require(four[j] >= (j < 3) && four[j] < int64_t(1) << 31, op, ": views must be positive and below 2^31, got ", four[j]);
            list_[i].view = {uint32_t(four[0]), uint32_t(four[1]), uint32_t(four[2]), uint32_t(four[3])};
            const int64_t columns = four[0] * four[2];
            require(columns < int64_t(1) << 31 && columns * four[1] == weights[i].numel(), op, ": a view must cover its weight's ",
                    weights[i].numel(), " elements, got ", columns, " columns of ", four[1], " rows");
            require(four[3] == 0 || columns % four[3] == 0, op, ": a period must divide the ", columns, " columns, got ", four[3]);
            rows_ += four[1];
            columns_ += columns;
        }
    }

    WeightArguments arguments;

    void tensors(int at, const Tensors& list, const char* name) {
        require(list.size() == list_.size(), op_, ": ", name, " must be ", list_.size(), " tensors, got ", list.size());
        for (size_t i = 0; i < list.size(); ++i) tensor(at, i, list[i], list_[i].view.numel(), name);
    }
    void per_row(int at, const Tensors& list, const char* name) {
        require(list.size() == list_.size(), op_, ": ", name, " must be ", list_.size(), " tensors, got ", list.size());
        for (size_t i = 0; i < list.size(); ++i) tensor(at, i, list[i], list_[i].view.R, name);
    }
    void per_column(int at, const Tensors& list, const char* name) {
        require(list.size() == list_.size(), op_, ": ", name, " must be ", list_.size(), " tensors, got ", list.size());
        for (size_t i = 0; i < list.size(); ++i) tensor(at, i, list[i], list_[i].view.columns(), name);
    }
    Tensors new_like(int at, const Tensors& like) {
        Tensors made;
        made.reserve(like.size());
        for (size_t i = 0; i < like.size(); ++i) {
            int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
            check(aoti_torch_get_dim(like[i].get(), &dim));
            check(aoti_torch_get_sizes(like[i].get(), &sizes));
            check(aoti_torch_get_strides(like[i].get(), &strides));
            made.push_back(empty(sizes, strides, dim, dtype_of(like[i]), place_));
            list_[i].tensors[at] = made.back().data_ptr();
        }
        return made;
    }

    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    int64_t count() const { return int64_t(list_.size()); }

    Tensor new_numbers(int64_t count, void*& data) const {
        Tensor made = flat(count, wide_);
        data = made.data_ptr();
        return made;
    }
    void* numbers(const Tensor& tensor, int64_t count, const char* name) const {
        require(tensor.numel() == count && dtype_of(tensor) == wide_, op_, ": ", name, " must have ", count, " values of ",
                arguments.type == Type::float64 ? "Double" : "Float", ", got ", tensor.numel(), " of ", name_of(tensor));
        return here(tensor, name);
    }

    void run(WeightStep step) {
        std::optional<torch::stable::accelerator::DeviceGuard> guard;
        if (!is_current(place_.index)) guard.emplace(place_.index);
        void* stream = current_stream(place_.index);
        std::optional<Tensor> scratch;  // the caching allocator keeps it for this stream's later work
        const size_t bytes = weight_scratch_bytes(step, list_.data(), int(list_.size()), arguments.type);
        if (bytes > 0) {
            scratch = flat(static_cast<int64_t>(bytes), aoti_torch_dtype_uint8());
            arguments.scratch = scratch->data_ptr();
        }
        const int status = run_weights(step, list_.data(), int(list_.size()), arguments, stream);
        require(status == ok, op_, ": ", error_string(status));
    }

   private:
    void tensor(int at, size_t i, const Tensor& tensor, int64_t elements, const char* name) {
        require(tensor.numel() == elements && dtype_of(tensor) == torch_dtype(arguments.type), op_, ": ", name, " ", i, " must have ",
                elements, " elements of ", name_of(weights_[0]), ", got ", tensor.numel(), " of ", name_of(tensor));
        list_[i].tensors[at] = here(tensor, name);
    }
    void* here(const Tensor& tensor, const char* name) const {
        require(place_of(tensor) == place_, op_, ": ", name, " must be on the device of the first weight (index ", place_.index,
                "), got index ", place_of(tensor).index);
        return tensor.data_ptr();
    }
    Tensor flat(int64_t count, int32_t dtype) const {
        const int64_t stride = 1;
        return empty(&count, &stride, 1, dtype, place_);
    }

    const char* op_;
    const Tensors& weights_;
    std::vector<Weight> list_;
    Place place_;
    int32_t wide_ = 0;
    int64_t rows_ = 0, columns_ = 0;
};

std::tuple<Tensors, Tensor> weight_norm(Tensors vs, Tensors gs, std::vector<int64_t> views) {
    WeightsCall call("weight_norm", vs, views);
    call.tensors(0, vs, "v");
    call.per_row(1, gs, "g");
    Tensors weights = call.new_like(2, vs);
    Tensor norms = call.new_numbers(call.rows(), call.arguments.norms);
    call.run(WeightStep::weight_norm);
    return {std::move(weights), std::move(norms)};
}

std::tuple<Tensors, Tensors> weight_norm_backward(Tensors dweights, Tensors vs, Tensors gs, Tensor norms, std::vector<int64_t> views) {
    WeightsCall call("weight_norm_backward", vs, views);
    call.tensors(0, dweights, "dw");
    call.tensors(1, vs, "v");
    call.per_row(2, gs, "g");
    Tensors dgs = call.new_like(3, gs);
    Tensors dvs = call.new_like(4, vs);
    call.arguments.norms = call.numbers(norms, call.rows(), "norms");
    call.run(WeightStep::weight_norm_backward);
    return {std::move(dgs), std::move(dvs)};
}

std::tuple<Tensors, Tensor, Tensor, Tensor> spectral_norm(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> views,
                                                          int64_t iterations, double eps) {
    WeightsCall call("spectral_norm", weights, views);
    require(iterations >= 0 && iterations < int64_t(1) << 31, "spectral_norm: iterations must not be negative, got ", iterations);
    call.arguments.iterations = static_cast<int>(iterations);
    call.arguments.eps = eps;
    call.tensors(0, weights, "weight");
    call.per_row(1, us, "u");
    call.per_column(2, vs, "v");
    Tensors normalised = call.new_like(3, weights);
    Tensor u = call.new_numbers(call.rows(), call.arguments.u);
    Tensor v = call.new_numbers(call.columns(), call.arguments.v);
    Tensor sigma = call.new_numbers(call.count(), call.arguments.sigma);
    call.run(WeightStep::spectral_norm);
    return {std::move(normalised), std::move(u), std::move(v), std::move(sigma)};
}

Tensors spectral_norm_backward(Tensors dweights, Tensors weights, Tensor u, Tensor v, Tensor sigma, std::vector<int64_t> views) {
    WeightsCall call("spectral_norm_backward", weights, views);
    call.tensors(0, dweights, "dw");
    call.tensors(1, weights, "weight");
    Tensors gradients = call.new_like(2, weights);
    call.arguments.u = call.numbers(u, call.rows(), "u");
    call.arguments.v = call.numbers(v, call.columns(), "v");
    call.arguments.sigma = call.numbers(sigma, call.count(), "sigma");
    call.run(WeightStep::spectral_norm_backward);
    return gradients;
}

}  // namespace
}  // namespace normfused

NF_LIBRARY_FRAGMENT(NF_NAMESPACE, library) {
    library.def("weight_norm(Tensor[] v, Tensor[] g, int[] views) -> (Tensor[] w, Tensor norms)");
    library.def("weight_norm_backward(Tensor[] dw, Tensor[] v, Tensor[] g, Tensor norms, int[] views) -> (Tensor[] dg, Tensor[] dv)");
    library.def(
        "spectral_norm(Tensor[] weight, Tensor(a!)[] u, Tensor(b!)[] v, int[] views, int iterations, float eps)"
        " -> (Tensor[] w, Tensor used_u, Tensor used_v, Tensor sigma)");
    library.def(
        "spectral_norm_backward(Tensor[] dw, Tensor[] weight, Tensor used_u, Tensor used_v, Tensor sigma, int[] views)"
        " -> Tensor[] dweight");
}

NF_IMPLEMENTATION(NF_NAMESPACE, NF_KEY, library) {
    library.impl("weight_norm", TORCH_BOX(&normfused::weight_norm));
    library.impl("weight_norm_backward", TORCH_BOX(&normfused::weight_norm_backward));
    library.impl("spectral_norm", TORCH_BOX(&normfused::spectral_norm));
    library.impl("spectral_norm_backward", TORCH_BOX(&normfused::spectral_norm_backward));
}
