// Storage types at the edge of memory, accumulators inside: float for float, half and bfloat16; double for double.
//
// A vector is 16 bytes of a tensor. Parameters (C values, or one for all channels) have a type of their own, known at run time:
// they are read once per thread or once per row, so the switch costs nothing that could be counted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"
#include "problem.h"

namespace normfused {

template <class T> struct Storage {
    using Accumulator = float;
};
template <> struct Storage<double> {
    using Accumulator = double;
};
template <class T> using AccumulatorOf = typename Storage<T>::Accumulator;
template <class T> constexpr int vector_size = 16 / int(sizeof(T));
template <class T> using Vector = Pack<T, vector_size<T>>;

NF_DEVICE float widen(float v) { return v; }
NF_DEVICE double widen(double v) { return v; }
NF_DEVICE float widen(__half v) { return __half2float(v); }
NF_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> NF_DEVICE T narrow(AccumulatorOf<T> v) { return v; }
template <> NF_DEVICE __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> NF_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Two at a time: for 2-byte types one instruction
NF_DEVICE void narrow_pair(float a, float b, float& x, float& y) { x = a, y = b; }
NF_DEVICE void narrow_pair(double a, double b, double& x, double& y) { x = a, y = b; }
NF_DEVICE void narrow_pair(float a, float b, __half& x, __half& y) {
    const __half2 two = __floats2half2_rn(a, b);
    x = __low2half(two), y = __high2half(two);
}
NF_DEVICE void narrow_pair(float a, float b, __nv_bfloat16& x, __nv_bfloat16& y) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    x = __low2bfloat16(two), y = __high2bfloat16(two);
}

// ``kSize`` lanes of a vector, from lane ``at`` on
template <class T, int kSize> NF_DEVICE void pack_part(const AccumulatorOf<T> (&from)[kSize], int at, Vector<T>& to) {
    NF_UNROLL
    for (int j = 0; j < kSize; j += 2) narrow_pair(from[j], from[j + 1], to.data[at + j], to.data[at + j + 1]);
}

// ------------------------------------------------------------------------------------------------------ parameters
template <class A> NF_DEVICE A load_parameter(const Parameter& p, int64_t channel, A absent) {
    if (p.data == nullptr) return absent;
    const int64_t i = p.per_channel ? channel : 0;
    switch (Type(opaque(int(p.type)))) {
        case Type::float32: return A(Global<float>(p.data).load_coherent(i));
        case Type::float16: return A(widen(Global<__half>(p.data).load_coherent(i)));
        case Type::bfloat16: return A(widen(Global<__nv_bfloat16>(p.data).load_coherent(i)));
        default: return A(Global<double>(p.data).load_coherent(i));
    }
}

template <class A> NF_DEVICE void store_parameter(const Parameter& p, int64_t channel, A value) {
    if (p.data == nullptr) return;
    const int64_t i = p.per_channel ? channel : 0;
    switch (p.type) {
        case Type::float32: return Global<float>(p.data).store(i, float(value));
        case Type::float16: return Global<__half>(p.data).store(i, __float2half_rn(float(value)));
        case Type::bfloat16: return Global<__nv_bfloat16>(p.data).store(i, __float2bfloat16_rn(float(value)));
        default: return Global<double>(p.data).store(i, double(value));
    }
}

template <class T, class A, int kLanes> NF_DEVICE void load_lanes_of(const T* data, int64_t at, A (&to)[kLanes]) {
    constexpr int kPart = kLanes < vector_size<T> ? kLanes : vector_size<T>;
    NF_UNROLL
    for (int part = 0; part < kLanes; part += kPart) {
        const Pack<T, kPart> values = Global<const T>(data).template load_coherent<kPart>(at + part);
        NF_UNROLL
        for (int j = 0; j < kPart; ++j) to[part + j] = A(widen(values.data[j]));
    }
}

// The values of neighbouring channels; lanes outside of [first, last) get ``absent``.
template <class A, int kLanes>
NF_DEVICE void load_channels(const Parameter& p, int64_t channel, int first, int last, A absent, A (&to)[kLanes]) {
    // float32 and half parameters cover every model; the address decides about wide accesses
    const bool wide = p.data != nullptr && p.per_channel && first == 0 && last == kLanes && channel % kLanes == 0 &&
                      reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
    if (wide && p.type == Type::float32) return load_lanes_of(static_cast<const float*>(p.data), channel, to);
    if (wide && p.type == Type::bfloat16) return load_lanes_of(static_cast<const __nv_bfloat16*>(p.data), channel, to);
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) to[j] = j >= first && j < last ? load_parameter(p, channel + j, absent) : absent;
}

}  // namespace normfused
