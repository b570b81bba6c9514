// What the files of operators share: torch's tensors as the kernels see them, the current stream, where operators are registered.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "../kernels/problem.h"

#ifdef NF_EMULATION
#define NF_NAMESPACE normfused_emulation
#define NF_KEY CPU
#else
#include <dlfcn.h>
#define NF_NAMESPACE normfused_cuda
#define NF_KEY CUDA
#endif

// Macros of torch's: they paste their arguments, so these names are expanded first
#define NF_LIBRARY(name, library) STABLE_TORCH_LIBRARY(name, library)
#define NF_LIBRARY_FRAGMENT(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(name, library)
#define NF_IMPLEMENTATION(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

namespace normfused {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Not STD_TORCH_CHECK, which puts this file's path before every message
template <typename... Parts> inline void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

inline void check(AOTITorchError error) { require(error == AOTI_TORCH_SUCCESS, "normfused: LibTorch refused a call of its stable ABI"); }

// ------------------------------------------------------------------------------------------------------------ tensors
inline int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype;
    check(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

inline const char* name_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

inline int32_t torch_dtype(Type type) {
    static const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
                                     aoti_torch_dtype_float64()};
    return dtypes[static_cast<int>(type)];
}

inline Type type_of(const Tensor& tensor, const char* op, const char* name) {
    const int32_t dtype = dtype_of(tensor);
    for (Type type : {Type::float32, Type::float16, Type::bfloat16, Type::float64}) {
        if (dtype == torch_dtype(type)) return type;
    }
    require(false, op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", name_of(tensor));
    return Type::float32;
}

struct Place {
    int32_t type, index;
    bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

inline Place place_of(const Tensor& tensor) {
    Place place;
    check(aoti_torch_get_device_type(tensor.get(), &place.type));
    check(aoti_torch_get_device_index(tensor.get(), &place.index));
    return place;
}

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype, Place place) {
    AtenTensorHandle made = nullptr;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, place.type, place.index, &made));
    return Tensor(made);
}

// -------------------------------------------------------------------------------------------------------- the stream
#ifdef NF_EMULATION
inline void* current_stream(int32_t) { return nullptr; }
#else
// Not linked: libtorch_cuda exists only where torch has CUDA, and the linker drops what nothing else needs
inline void* current_stream(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = []() -> Function {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    require(function != nullptr, "normfused: this torch has no CUDA (libtorch_cuda.so is not loaded)");
    void* stream = nullptr;
    check(function(device, &stream));
    return stream;
}
#endif

}  // namespace normfused
