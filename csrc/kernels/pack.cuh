// Storage types at the edge of memory, accumulators inside: float for float, half and bfloat16; double for double.
//
// A vector is 16 bytes of a tensor, kept in the words of a load. Parameters (C values, or one for all channels) have a type of their own,
// known at run time: they are read once per thread or once per row, so the switch costs nothing that could be counted.
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

NF_DEVICE float widen(float v) { return v; }
NF_DEVICE double widen(double v) { return v; }
NF_DEVICE float widen(__half v) { return __half2float(v); }
NF_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> NF_DEVICE T narrow(AccumulatorOf<T> v) { return v; }
template <> NF_DEVICE __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> NF_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Two 2-byte numbers are a word: one instruction to make it, and one for each number that is taken out
NF_DEVICE uint32_t word_of(float low, float high, __half) { return same_bits<uint32_t>(__floats2half2_rn(low, high)); }
NF_DEVICE uint32_t word_of(float low, float high, __nv_bfloat16) { return same_bits<uint32_t>(__floats2bfloat162_rn(low, high)); }
NF_DEVICE float low_of(uint32_t word, __half) { return __low2float(same_bits<__half2>(word)); }
NF_DEVICE float high_of(uint32_t word, __half) { return __high2float(same_bits<__half2>(word)); }
NF_DEVICE float low_of(uint32_t word, __nv_bfloat16) { return same_bits<float>(word << 16); }
NF_DEVICE float high_of(uint32_t word, __nv_bfloat16) { return same_bits<float>(word & 0xffff0000u); }

// 16 bytes of a tensor, in the words that a load gives. In registers of their own, 2-byte numbers would take twice as many, and an
// instruction each to get there.
template <class T> struct Vector {
    using A = AccumulatorOf<T>;
    static constexpr int V = vector_size<T>;
    Pack<uint32_t, 4> words;

    Vector() = default;
    NF_DEVICE explicit Vector(const Pack<uint32_t, 4>& words_) : words(words_) {}
    NF_DEVICE Vector(const Pack<T, V>& pack) : words(words_of(pack)) {}
    NF_DEVICE Pack<T, V> pack() const { return pack_of<T>(words); }

    NF_DEVICE A get(int j) const {
        if constexpr (sizeof(T) == 2) return j % 2 ? high_of(words.data[j / 2], T()) : low_of(words.data[j / 2], T());
        else return pack_of<T>(bits_of(j)).data[0];
    }
    // N lanes from lane ``at`` on
    template <int N> NF_DEVICE void set(int at, const A (&v)[N]) {
        if constexpr (sizeof(T) == 2) {
            NF_UNROLL
            for (int j = 0; j < N; j += 2) words.data[(at + j) / 2] = word_of(v[j], v[j + 1], T());
        } else {
            NF_UNROLL
            for (int j = 0; j < N; ++j) {
                const Pack<uint32_t, kBits> bits = words_of(Pack<T, 1>{{v[j]}});
                NF_UNROLL
                for (int i = 0; i < kBits; ++i) words.data[(at + j) * kBits + i] = bits.data[i];
            }
        }
    }

    // Lanes that are not asked for become zero
    template <class Has> NF_DEVICE void keep(const Has& has) {
        constexpr int per_word = sizeof(T) == 2 ? 2 : 1;
        NF_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int lane = sizeof(T) == 8 ? i / 2 : i * per_word;
            if (!has(lane)) words.data[i] &= per_word == 2 ? 0xffff0000u : 0u;
            if (per_word == 2 && !has(lane + 1)) words.data[i] &= 0xffffu;
        }
    }

   private:
    static constexpr int kBits = sizeof(T) < 4 ? 1 : int(sizeof(T)) / 4;  // words of a number
    NF_DEVICE Pack<uint32_t, kBits> bits_of(int j) const {
        Pack<uint32_t, kBits> bits;
        NF_UNROLL
        for (int i = 0; i < kBits; ++i) bits.data[i] = words.data[j * kBits + i];
        return bits;
    }
};

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
