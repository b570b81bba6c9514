// The one portability header: everything that a kernel asks of the machine, in terms that nvcc and a C++17 compiler both know.
//
// Compiled by nvcc (sm_80 and newer) a helper is an instruction or two; compiled by g++ with -DNF_EMULATION it is a call into the SIMT
// emulation, which checks it. Kernels contain no PTX, no intrinsic, no __CUDA_ARCH__ and no bare pointer: global memory is a Global<T>,
// shared memory a Shared<T>. What needs sm_90 traps below it, so that kernels need no #if and the set of kernels is the same everywhere.
//
// Rules: full warps' shuffles and votes in uniform control flow; every thread of a block passes the same barriers, from the same
// line; no return before a barrier; lanes exchange data through memory only across sync_warp(). Barriers, waits and accesses take the
// place of their call as a hidden last argument (Site): an empty type on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef NF_EMULATION
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif

#ifdef NF_EMULATION
#define NF_DEVICE inline
#define NF_HOST_DEVICE inline
#define NF_KERNEL(max_threads) void
#define NF_GRID_CONSTANT const
#define NF_UNROLL
#define NF_NO_UNROLL
#define NF_ON_DEVICE(...)
#define NF_EMULATED(...) __VA_ARGS__
// NVIDIA's headers define it as nothing for a host compiler: each thread would silently get an array of its own
#undef __shared__
#define __shared__ bare_shared_memory_is_not_emulated_use_Shared
#else
#define NF_DEVICE __device__ __forceinline__
#define NF_HOST_DEVICE __host__ __device__ __forceinline__
#define NF_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#define NF_GRID_CONSTANT const __grid_constant__
#define NF_UNROLL _Pragma("unroll")
#define NF_NO_UNROLL _Pragma("unroll 1")
#define NF_ON_DEVICE(...) __VA_ARGS__
#define NF_EMULATED(...)
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define NF_SM90(...) __trap();
#else
#define NF_SM90(...) __VA_ARGS__
#endif

namespace normfused {

// ---------------------------------------------------------------------------------------------------------------------- launching

struct LaunchConfig {
    const char* name;  // of the kernel, in messages
    uint32_t blocks, threads, shared_bytes;
    void* stream;
    bool cooperative = false;
    uint32_t cluster = 1;
};

// Where a helper was called
struct Site {
#ifdef NF_EMULATION
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
#else
    NF_HOST_DEVICE static constexpr Site here() { return {}; }
#endif
};

enum class Cache { normal, evict_first, evict_last };  // evict_last: of 16-byte accesses; others are normal

}  // namespace normfused

#ifdef NF_EMULATION
#include "../emulation/simt.h"
#endif

namespace normfused {

constexpr uint32_t max_threads_of_block = 1024, max_blocks_of_cluster = 8;

// Of launch(): blocks that must run together do not find room together, or (in a part of a device, MPS) no such cluster ever does.
// cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidClusterSize, cudaErrorLaunchOutOfResources
constexpr bool not_together(int status) { return status == 720 || status == 912 || status == 701; }

// Whether no device would take this launch
inline bool impossible(const LaunchConfig& config) {
    return config.blocks == 0 || config.blocks > 0x7fffffffu || config.threads == 0 || config.threads > max_threads_of_block ||
           config.cluster == 0 || config.cluster > max_blocks_of_cluster || config.blocks % config.cluster != 0;
}

#ifdef NF_EMULATION

// 0, or a cudaError_t, or simt::failed after a reported fault
template <class Arguments> int launch(void (*kernel)(Arguments), const LaunchConfig& config, const Arguments& arguments) {
    static_assert(std::is_trivially_copyable<Arguments>::value, "kernels take one plain struct");
    auto call = [](const void* kernel_and_arguments) {
        auto both = static_cast<const void* const*>(kernel_and_arguments);
        reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(both[0]))(*static_cast<const Arguments*>(both[1]));
    };
    const void* both[2] = {reinterpret_cast<const void*>(kernel), &arguments};
    return simt::launch(config, impossible(config), call, both);
}

inline const char* emulation_message() { return simt::message(); }

// Names the memory of the following launches of this host thread: an access outside of everything declared is a fault. ``writable``:
// whether a launch may write to it. A name declared again replaces the former; the same memory may have several names.
inline void declare(const char* name, const void* pointer, int64_t bytes, bool writable) { simt::declare(name, pointer, bytes, writable); }
inline void forget_all() { simt::forget_all(); }

#else

// More than 48 KB of dynamic shared memory must be asked for, once for a kernel and device. Such a kernel gets all that the processor can
// take from its L1: plans count on two blocks of half of it, and what streams by has no use for L1.
inline cudaError_t allow_shared_bytes(const void* kernel, uint32_t bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, uint32_t> allowed;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    std::lock_guard<std::mutex> lock(mutex);
    uint32_t& now = allowed[{kernel, device}];
    if (bytes <= now) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess && now == 0)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) now = bytes;
    return error;
}

template <class Arguments> int launch(void (*kernel)(Arguments), const LaunchConfig& config, const Arguments& arguments) {
    static_assert(std::is_trivially_copyable<Arguments>::value, "kernels take one plain struct");
    if (impossible(config)) return cudaErrorInvalidConfiguration;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (config.shared_bytes > 48 * 1024) {
        cudaError_t error = allow_shared_bytes(function, config.shared_bytes);
        if (error != cudaSuccess) {
            cudaGetLastError();  // or the next launch to be checked would be blamed
            return error;
        }
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(config.blocks);
    how.blockDim = dim3(config.threads);
    how.dynamicSmemBytes = config.shared_bytes;
    how.stream = static_cast<cudaStream_t>(config.stream);
    how.attrs = attributes;
    if (config.cooperative) {
        attributes[how.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[how.numAttrs++].val.cooperative = 1;
    }
    if (config.cluster > 1) {
        attributes[how.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[how.numAttrs].val.clusterDim.x = config.cluster;
        attributes[how.numAttrs].val.clusterDim.y = 1;
        attributes[how.numAttrs++].val.clusterDim.z = 1;
    }
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    cudaError_t error = cudaLaunchKernelExC(&how, function, parameters);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

inline const char* emulation_message() { return ""; }
inline void declare(const char*, const void*, int64_t, bool) {}
inline void forget_all() {}

#endif

// ----------------------------------------------------------------------------------------------------------------------- who am I

NF_DEVICE unsigned thread_index() { NF_ON_DEVICE(return threadIdx.x;) NF_EMULATED(return simt::current->index;) }
NF_DEVICE unsigned block_threads() { NF_ON_DEVICE(return blockDim.x;) NF_EMULATED(return simt::grid.threads;) }
NF_DEVICE unsigned block_index() { NF_ON_DEVICE(return blockIdx.x;) NF_EMULATED(return simt::current->block_index;) }
NF_DEVICE unsigned grid_blocks() { NF_ON_DEVICE(return gridDim.x;) NF_EMULATED(return simt::grid.blocks;) }
NF_DEVICE unsigned lane_index() { return thread_index() & 31; }
NF_DEVICE unsigned warp_index() { return thread_index() >> 5; }

// A launch without clusters is one of clusters of one block, on any device
NF_DEVICE unsigned cluster_rank() {
    NF_EMULATED(return simt::current->block_index % simt::grid.cluster;)
#ifndef NF_EMULATION
    unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
#endif
}
NF_DEVICE unsigned cluster_blocks() {
    NF_EMULATED(return simt::grid.cluster;)
#ifndef NF_EMULATION
    unsigned blocks = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
    return blocks;
#endif
}

// N values that are loaded or stored as one. N*sizeof(T): a power of two; more than 16 bytes take several accesses.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T data[N];
    NF_HOST_DEVICE T& operator[](int i) { return data[i]; }
    NF_HOST_DEVICE const T& operator[](int i) const { return data[i]; }
};

// Between float, double, half and bfloat16, rounding to nearest even
template <class To, class From> NF_HOST_DEVICE To convert(From value) {
    if constexpr (std::is_same<To, From>::value) {
        return value;
    } else if constexpr (std::is_same<From, __half>::value) {
        return static_cast<To>(__half2float(value));
    } else if constexpr (std::is_same<From, __nv_bfloat16>::value) {
        return static_cast<To>(__bfloat162float(value));
    } else if constexpr (std::is_same<To, __half>::value) {
        if constexpr (std::is_same<From, double>::value) return __double2half(value);
        else return __float2half_rn(static_cast<float>(value));
    } else if constexpr (std::is_same<To, __nv_bfloat16>::value) {
        if constexpr (std::is_same<From, double>::value) return __double2bfloat16(value);
        else return __float2bfloat16_rn(static_cast<float>(value));
    } else {
        return static_cast<To>(value);
    }
}

// -------------------------------------------------------------------------------------------------------------------- raw accesses

#ifndef NF_EMULATION
namespace raw {

template <int bytes> struct Word;
template <> struct Word<1> {
    using type = unsigned char;
};
template <> struct Word<2> {
    using type = unsigned short;
};
template <> struct Word<4> {
    using type = unsigned;
};
template <> struct Word<8> {
    using type = uint2;
};
template <> struct Word<16> {
    using type = uint4;
};

// The widest access that serves a value of so many bytes, and how many of them it takes
template <class V> using WordOf = typename Word<(sizeof(V) < 16 ? sizeof(V) : 16)>::type;
template <class V> constexpr int words_of = sizeof(V) < 16 ? 1 : sizeof(V) / 16;

NF_DEVICE unsigned long long evict_last_policy() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
NF_DEVICE unsigned long long evict_first_policy() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
NF_DEVICE void copy_async(unsigned to, const void* from, Cache cache) {
    if (cache == Cache::normal) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                     "l"(cache == Cache::evict_first ? evict_first_policy() : evict_last_policy())
                     : "memory");
    }
}
NF_DEVICE uint4 load_evict_last(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)), "l"(evict_last_policy())
                 : "memory");
    return v;
}
NF_DEVICE uint4 load_read_only_evict_last(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(p)), "l"(evict_last_policy()));
    return v;
}
NF_DEVICE void store_evict_last(uint4* p, uint4 v) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w), "l"(evict_last_policy())
                 : "memory");
}

template <class W> NF_DEVICE W load_word(const W* p, bool read_only, Cache cache) {
    if constexpr (std::is_same<W, uint4>::value) {
        if (cache == Cache::evict_last) return read_only ? load_read_only_evict_last(p) : load_evict_last(p);
    }
    if (cache == Cache::evict_first) return __ldcs(p);
    if (read_only) return __ldg(p);
    if constexpr (std::is_same<W, uint4>::value) {  // written out: a plain access of 16 bytes may be split
        uint4 v;
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(__cvta_generic_to_global(p))
                     : "memory");
        return v;
    } else {
        __builtin_assume(__isGlobal(p));
        return *p;
    }
}
template <class W> NF_DEVICE void store_word(W* p, W value, Cache cache) {
    if constexpr (std::is_same<W, uint4>::value) {
        if (cache == Cache::evict_last) return store_evict_last(p, value);
    }
    if (cache == Cache::evict_first) return __stcs(p, value);
    if constexpr (std::is_same<W, uint4>::value) {  // as above; without it ptxas is given four stores of 4 bytes
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(value.x), "r"(value.y),
                     "r"(value.z), "r"(value.w)
                     : "memory");
    } else {
        __builtin_assume(__isGlobal(p));
        *p = value;
    }
}
template <class V> NF_DEVICE V load(const void* p, bool read_only, Cache cache) {
    WordOf<V> words[words_of<V>];
    NF_UNROLL for (int k = 0; k < words_of<V>; ++k) words[k] = load_word(static_cast<const WordOf<V>*>(p) + k, read_only, cache);
    V value;
    memcpy(&value, words, sizeof(V));
    return value;
}
template <class V> NF_DEVICE void store(void* p, const V& value, Cache cache) {
    WordOf<V> words[words_of<V>];
    memcpy(words, &value, sizeof(V));
    NF_UNROLL for (int k = 0; k < words_of<V>; ++k) store_word(static_cast<WordOf<V>*>(p) + k, words[k], cache);
}
template <class V> NF_DEVICE V load_shared(const void* p) {
    WordOf<V> words[words_of<V>];
    NF_UNROLL for (int k = 0; k < words_of<V>; ++k) words[k] = static_cast<const WordOf<V>*>(p)[k];
    V value;
    memcpy(&value, words, sizeof(V));
    return value;
}
template <class V> NF_DEVICE void store_shared(void* p, const V& value) {
    WordOf<V> words[words_of<V>];
    memcpy(words, &value, sizeof(V));
    NF_UNROLL for (int k = 0; k < words_of<V>; ++k) static_cast<WordOf<V>*>(p)[k] = words[k];
}
NF_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

}  // namespace raw
#endif

// ------------------------------------------------------------------------------------------------------------------- global memory

// A tensor in global memory, from some element on. Indices count elements of T; that of a pack is a multiple of N from an aligned start.
template <class T> class Global {
   public:
    using value_type = std::remove_const_t<T>;
    using pointer = std::conditional_t<std::is_const<T>::value, const void*, void*>;

    Global() = default;
    NF_HOST_DEVICE Global(pointer p) : at_(static_cast<T*>(p)) NF_EMULATED(, origin_(p)) {}
    template <class U, class = std::enable_if_t<std::is_const<T>::value && std::is_same<const U, T>::value>>
    NF_HOST_DEVICE Global(Global<U> other) : at_(other.at_) NF_EMULATED(, origin_(other.origin_)) {}

    NF_HOST_DEVICE explicit operator bool() const { return at_ != nullptr; }
    NF_HOST_DEVICE Global advance(int64_t elements) const {
        Global there = *this;
        there.at_ += elements;
        return there;
    }

    // By the read-only path: of what no thread of the launch writes
    template <int N> NF_DEVICE Pack<value_type, N> load(int64_t i, Cache cache = Cache::normal, Site site = Site::here()) const {
        return get<Pack<value_type, N>, true>(i, cache, site);
    }
    NF_DEVICE value_type load(int64_t i, Cache cache = Cache::normal, Site site = Site::here()) const {
        return get<value_type, true>(i, cache, site);
    }
    // Of what the launch may also write: coherent across a barrier that orders the two
    template <int N> NF_DEVICE Pack<value_type, N> load_coherent(int64_t i, Cache cache = Cache::normal, Site site = Site::here()) const {
        return get<Pack<value_type, N>, false>(i, cache, site);
    }
    NF_DEVICE value_type load_coherent(int64_t i, Cache cache = Cache::normal, Site site = Site::here()) const {
        return get<value_type, false>(i, cache, site);
    }
    template <int N>
    NF_DEVICE void store(int64_t i, const Pack<value_type, N>& value, Cache cache = Cache::normal, Site site = Site::here()) const {
        put(i, value, cache, site);
    }
    NF_DEVICE void store(int64_t i, value_type value, Cache cache = Cache::normal, Site site = Site::here()) const {
        put(i, value, cache, site);
    }

   private:
    template <class V, bool read_only> NF_DEVICE V get(int64_t i, Cache cache, Site site) const {
        NF_ON_DEVICE(return raw::load<V>(at_ + i, read_only, cache);)
#ifdef NF_EMULATION
        (void)cache;
        simt::touch_global(origin_, at_ + i, sizeof(V), sizeof(T), read_only ? simt::Touch::read_only : simt::Touch::read, site);
        V value;
        std::memcpy(static_cast<void*>(&value), at_ + i, sizeof(V));
        return value;
#endif
    }
    template <class V> NF_DEVICE void put(int64_t i, const V& value, Cache cache, Site site) const {
        static_assert(!std::is_const<T>::value, "a Global<const T> cannot store");
        NF_ON_DEVICE(raw::store(at_ + i, value, cache);)
#ifdef NF_EMULATION
        (void)cache;
        simt::touch_global(origin_, at_ + i, sizeof(V), sizeof(T), simt::Touch::write, site);
        std::memcpy(static_cast<void*>(at_ + i), &value, sizeof(V));
#endif
    }

    T* at_ = nullptr;
#ifdef NF_EMULATION
    const void* origin_ = nullptr;  // tells the tensor, so that an index beyond it is not taken for its neighbour's
#endif
    template <class> friend class Global;
    template <class U> friend NF_DEVICE Global<U> pinned(Global<U> view);
    friend struct Machine;
};

// ------------------------------------------------------------------------------------------------------------------- shared memory

#ifndef NF_EMULATION
extern __shared__ __align__(128) unsigned char nf_dynamic_shared_memory[];
#endif

// count() elements of the block's dynamic shared memory, or of another block of the cluster. No content before it is written.
template <class T> class Shared {
   public:
    Shared() = default;
    NF_DEVICE int count() const { return count_; }

    template <int N> NF_DEVICE Pack<T, N> load(int i, Site site = Site::here()) const { return read<Pack<T, N>>(i, N, site); }
    template <int N> NF_DEVICE void store(int i, const Pack<T, N>& value, Site site = Site::here()) const { write(i, N, value, site); }
    NF_DEVICE T get(int i, Site site = Site::here()) const { return read<T>(i, 1, site); }
    NF_DEVICE void set(int i, T value, Site site = Site::here()) const { write(i, 1, value, site); }

    NF_DEVICE Shared part(int first, int count, Site site = Site::here()) const {
        NF_EMULATED(simt::check_part(first, count, count_, site);)
        (void)site;
        Shared view = *this;
        view.at_ += first;
        view.count_ = count;
        return view;
    }

    // The same view in another block of the cluster, which must have been met at a sync_cluster() before, and must be after
    NF_DEVICE Shared on_block(unsigned rank, Site site = Site::here()) const {
        Shared view = *this;
        (void)site;
        NF_EMULATED(view.at_ = static_cast<T*>(simt::on_block(at_, rank, site));)
#ifndef NF_EMULATION
        NF_SM90(asm("mapa.u64 %0, %1, %2;" : "=l"(view.at_) : "l"(at_), "r"(rank));)
#endif
        return view;
    }

   private:
    template <class V> NF_DEVICE V read(int i, int n, Site site) const {
        (void)n, (void)site;
        NF_ON_DEVICE(return raw::load_shared<V>(at_ + i);)
#ifdef NF_EMULATION
        simt::touch_shared(at_, i, n, count_, sizeof(T), simt::Touch::read, site);
        V value;
        std::memcpy(static_cast<void*>(&value), at_ + i, sizeof(V));
        return value;
#endif
    }
    template <class V> NF_DEVICE void write(int i, int n, const V& value, Site site) const {
        (void)n, (void)site;
        NF_ON_DEVICE(raw::store_shared(at_ + i, value);)
#ifdef NF_EMULATION
        simt::touch_shared(at_, i, n, count_, sizeof(T), simt::Touch::write, site);
        std::memcpy(static_cast<void*>(at_ + i), &value, sizeof(V));
#endif
    }

    T* at_ = nullptr;
    int count_ = 0;
    template <class U> friend NF_DEVICE Shared<U> shared_at(unsigned byte_offset, int count, Site site);
    template <class U> friend NF_DEVICE Shared<U> pinned(Shared<U> view);
    friend struct Machine;
};

template <class T> NF_DEVICE Shared<T> shared_at(unsigned byte_offset, int count, Site site = Site::here()) {
    Shared<T> view;
    (void)site;
    NF_ON_DEVICE(view.at_ = reinterpret_cast<T*>(nf_dynamic_shared_memory + byte_offset);)
    NF_EMULATED(view.at_ = static_cast<T*>(simt::shared_at(byte_offset, int64_t(count) * sizeof(T), alignof(T), site));)
    view.count_ = count;
    return view;
}

// The same view, whose address is kept: else the compiler finds the block's shared memory anew (three instructions) for every access
template <class T> NF_DEVICE Shared<T> pinned(Shared<T> view) {
#ifndef NF_EMULATION
    asm volatile("" : "+l"(view.at_));
    __builtin_assume(__isShared(view.at_));
#endif
    return view;
}

template <class T> NF_DEVICE Global<T> pinned(Global<T> view) {
    NF_ON_DEVICE(asm volatile("" : "+l"(view.at_));)
    return view;
}

// The only one to see the pointers in views
struct Machine {
    template <class Barrier> NF_DEVICE static void* pointer(const Barrier& barrier) { return barrier.at_; }
    template <class T> NF_DEVICE static T* pointer(const Global<T>& view) { return view.at_; }
    template <class T> NF_DEVICE static T* pointer(const Shared<T>& view) { return view.at_; }
    NF_EMULATED(template <class T> static const void* origin(const Global<T>& view) { return view.origin_; })
};

// ------------------------------------------------------------------------------------------------------------------------ barriers

// Writes before a barrier are seen after it by whom it holds: the warp, the block, the cluster (also shared memory), the grid.
NF_DEVICE void sync_warp(Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(__syncwarp();)
    NF_EMULATED(simt::sync_warp(site);)
}
NF_DEVICE void sync_block(Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(__syncthreads();)
    NF_EMULATED(simt::sync_block(site);)
}
// A barrier that also tells whether the value is true for any thread of the block
NF_DEVICE bool any_in_block(bool value, Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(return __syncthreads_or(value);)
    NF_EMULATED(return simt::any_in_block(value, site);)
}
NF_DEVICE void sync_cluster(Site site = Site::here()) {
    (void)site;
    NF_EMULATED(simt::sync_cluster(site);)
#ifndef NF_EMULATION
    __syncwarp();  // ``aligned`` asks for all lanes together, which the compiler need not see to for what is written out
    NF_SM90(asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" :: : "memory");)
#endif
}

// Before a block exits while others of its cluster may still read its shared memory: they have read, and nobody waits for stores
NF_DEVICE void leave_cluster(Site site = Site::here()) {
    (void)site;
    NF_EMULATED(simt::sync_cluster(site);)
#ifndef NF_EMULATION
    __syncwarp();
    NF_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" :: : "memory");)
#endif
}

// An arrival word is at rest when its low 31 bits are zero; a barrier or a count of arrivals starts from and leaves it so. The top bit
// is the sense of a barrier of blocks: it flips with each, so that one atomic per block does, and nobody needs to reset anything.
constexpr uint32_t arrival_sense = 0x80000000u;

// Of a cooperative launch: among ``parties`` blocks that come with the same word, which is at rest before the launch. ``leads`` is true in
// exactly one of them. The same word may serve their next barrier, and other blocks meet at other words meanwhile.
NF_DEVICE void sync_blocks(Global<uint32_t> word, unsigned parties, bool leads, Site site = Site::here()) {
    (void)site;
    NF_EMULATED(simt::sync_blocks(Machine::origin(word), Machine::pointer(word), parties, leads, site);)
#ifndef NF_EMULATION
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t* arrived = Machine::pointer(word);
        __threadfence();
        const uint32_t before = atomicAdd(arrived, leads ? arrival_sense - (parties - 1) : 1u);
        uint32_t now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(arrived)) : "memory");
        } while (((now ^ before) & arrival_sense) == 0);
        __threadfence();
    }
    __syncthreads();
#endif
}
NF_DEVICE void sync_grid(Global<uint32_t> word, Site site = Site::here()) { sync_blocks(word, grid_blocks(), block_index() == 0, site); }

// Called by all threads of ``parties`` blocks with the same word: true, for all threads, in the block that comes last. It sees by
// load_coherent what the others wrote before they came, and the word is at rest again.
NF_DEVICE bool last_to_arrive(Global<uint32_t> word, unsigned parties, Site site = Site::here()) {
    (void)site;
    NF_EMULATED(return simt::last_to_arrive(Machine::origin(word), Machine::pointer(word), parties, site);)
#ifndef NF_EMULATION
    bool last = false;
    __syncthreads();  // what thread 0 has seen of its block by the barrier, its fence passes on
    if (threadIdx.x == 0) {
        uint32_t* arrived = Machine::pointer(word);
        __threadfence();
        const uint32_t before = atomicAdd(arrived, 1u);
        last = (before & ~arrival_sense) == parties - 1;
        if (last) *arrived = before & arrival_sense;  // the other parties are through with it
        __threadfence();
    }
    return __syncthreads_or(last);
#endif
}

// ------------------------------------------------------------------------------------------------------------------------ shuffles

#ifdef NF_EMULATION
template <class T> T shuffled(T value, unsigned source, Site site) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "float, double, int32 or uint32");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = simt::shuffle(bits, source, site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
#endif

// Of float, double, int32_t, uint32_t, among all lanes of a full warp; no ordering of memory
template <class T> NF_DEVICE T shuffle_xor(T value, unsigned mask, Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(return __shfl_xor_sync(0xffffffffu, value, mask);)
    NF_EMULATED(return shuffled(value, lane_index() ^ mask, site);)
}
// The last ``delta`` lanes keep their own
template <class T> NF_DEVICE T shuffle_down(T value, unsigned delta, Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(return __shfl_down_sync(0xffffffffu, value, delta);)
    NF_EMULATED(return shuffled(value, lane_index() + delta < 32 ? lane_index() + delta : lane_index(), site);)
}
template <class T> NF_DEVICE T shuffle(T value, unsigned source_lane, Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(return __shfl_sync(0xffffffffu, value, source_lane);)
    NF_EMULATED(return shuffled(value, source_lane & 31, site);)
}

// ------------------------------------------------------------------------------------------------------------- asynchronous copies

// 16 bytes from global to shared memory by the calling thread, which may read them after copy_async_wait(), the block after a barrier
template <int N, class T, class S>
NF_DEVICE void copy_async(Shared<T> to, int i, Global<S> from, int64_t j, Cache cache = Cache::normal, Site site = Site::here()) {
    static_assert(std::is_same<T, std::remove_const_t<S>>::value, "one type");
    static_assert(N * sizeof(T) == 16, "16 bytes");
    (void)site, (void)cache;
    NF_ON_DEVICE(raw::copy_async(raw::shared_address(Machine::pointer(to) + i), Machine::pointer(from) + j, cache);)
    NF_EMULATED(simt::copy_async({Machine::pointer(to), i, N, to.count(), int(sizeof(T))}, Machine::origin(from),
                                 Machine::pointer(from) + j, site);)
}
NF_DEVICE void copy_async_commit() {
    NF_ON_DEVICE(asm volatile("cp.async.commit_group;" :: : "memory");)
    NF_EMULATED(simt::copy_async_commit();)
}
// Until at most ``pending`` of the groups committed last are under way
template <int pending> NF_DEVICE void copy_async_wait(Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");)
    NF_EMULATED(simt::copy_async_wait(pending, site);)
}

// Counts the bytes of bulk copies into shared memory. One thread calls init(1), then the block syncs; per phase (0, 1, 0, ...) one thread
// calls expect_bytes() and starts copies of as many bytes in total, and every reader waits for the phase. 8 bytes of shared memory.
class BulkBarrier {
   public:
    NF_DEVICE explicit BulkBarrier(void* at) : at_(at) {}
    NF_DEVICE void init(unsigned arrivals, Site site = Site::here()) const {
        (void)site, (void)arrivals;
        NF_EMULATED(simt::bulk_init(at_, arrivals, site);)
#ifndef NF_EMULATION
        NF_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;\n\t"
                             "fence.proxy.async.shared::cta;" ::"r"(raw::shared_address(at_)),
                             "r"(arrivals) : "memory");)
#endif
    }
    // Counts as the arrival of the calling thread
    NF_DEVICE void expect_bytes(unsigned bytes, Site site = Site::here()) const {
        (void)site, (void)bytes;
        NF_EMULATED(simt::bulk_expect(at_, bytes, site);)
#ifndef NF_EMULATION
        NF_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(raw::shared_address(at_)),
                             "r"(bytes) : "memory");)
#endif
    }
    NF_DEVICE void wait(unsigned phase, Site site = Site::here()) const {
        (void)site, (void)phase;
        NF_EMULATED(simt::bulk_wait(at_, phase, site);)
#ifndef NF_EMULATION
        NF_SM90(asm volatile("{\n\t.reg .pred done;\n\tAGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                             "@!done bra AGAIN;\n\t}" ::"r"(raw::shared_address(at_)),
                             "r"(phase & 1) : "memory");)
#endif
    }

   private:
    void* at_;
    friend struct Machine;
};

NF_DEVICE BulkBarrier bulk_barrier_at(unsigned byte_offset, Site site = Site::here()) {
    (void)site;
    NF_ON_DEVICE(return BulkBarrier(nf_dynamic_shared_memory + byte_offset);)
    NF_EMULATED(return BulkBarrier(simt::shared_at(byte_offset, 8, 8, site));)
}

// By one thread: count*sizeof(T) a multiple of 16, both ends aligned to 16 bytes. Global to shared, counted by the barrier.
template <class T, class S>
NF_DEVICE void copy_bulk(Shared<T> to, int i, Global<S> from, int64_t j, int count, BulkBarrier barrier, Site site = Site::here()) {
    static_assert(std::is_same<T, std::remove_const_t<S>>::value, "one type");
    (void)site, (void)to, (void)i, (void)from, (void)j, (void)count, (void)barrier;
    NF_EMULATED(simt::copy_bulk({Machine::pointer(to), i, count, to.count(), int(sizeof(T))}, Machine::origin(from),
                                Machine::pointer(from) + j, Machine::pointer(barrier), site);)
#ifndef NF_EMULATION
    NF_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             raw::shared_address(Machine::pointer(to) + i)),
                         "l"(__cvta_generic_to_global(Machine::pointer(from) + j)), "r"(static_cast<unsigned>(count * sizeof(T))),
                         "r"(raw::shared_address(Machine::pointer(barrier))) : "memory");)
#endif
}
// Shared to global. What other threads wrote to the source: each of them calls fence_bulk(), then a barrier, then one thread copies.
template <class T> NF_DEVICE void copy_bulk(Global<T> to, int64_t j, Shared<T> from, int i, int count, Site site = Site::here()) {
    (void)site, (void)to, (void)i, (void)from, (void)j, (void)count;
    NF_EMULATED(simt::copy_bulk_out({Machine::pointer(from), i, count, from.count(), int(sizeof(T))}, Machine::origin(to),
                                    Machine::pointer(to) + j, site);)
#ifndef NF_EMULATION
    NF_SM90(asm volatile(
                "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(Machine::pointer(to) + j)),
                "r"(raw::shared_address(Machine::pointer(from) + i)), "r"(static_cast<unsigned>(count * sizeof(T))) : "memory");)
#endif
}
NF_DEVICE void copy_bulk_commit() {
    NF_EMULATED(simt::copy_bulk_commit();)
#ifndef NF_EMULATION
    NF_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory");)
#endif
}
// By the thread that copied out, before it exits or the source is written again: until at most ``pending`` groups are under way
template <int pending> NF_DEVICE void copy_bulk_wait(Site site = Site::here()) {
    (void)site;
    NF_EMULATED(simt::copy_bulk_wait(pending, site);)
#ifndef NF_EMULATION
    NF_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");)
#endif
}
// Makes this thread's writes to shared memory visible to bulk copies, or its reads precede them
NF_DEVICE void fence_bulk() {
#ifndef NF_EMULATION
    NF_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
#endif
}

// -------------------------------------------------------------------------------------------------------------------------- values

// The same number, of which the compiler knows nothing: a switch on it is not drawn out of the loop around it, which would copy the loop
// once per case. No instruction.
NF_DEVICE int opaque(int value) {
    NF_ON_DEVICE(asm volatile("" : "+r"(value));)
    return value;
}
// The same bits as another type
template <class To, class From> NF_DEVICE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}
// A pack as the words that a load of it gives, and back. Where one of two branches loads 16 bytes, numbers of 16 bits would be taken out of
// the words inside the branch, which waits for the load: a thread would never have two under way. So both give words, opaque ones
// where they are made of numbers and where they meet. No instruction.
template <class T, int N> NF_DEVICE Pack<uint32_t, int(sizeof(T)) * N / 4> words_of(const Pack<T, N>& pack) {
    Pack<uint32_t, int(sizeof(T)) * N / 4> words;
    memcpy(&words, &pack, sizeof(pack));
    return words;
}
template <class T, int W> NF_DEVICE Pack<T, W * 4 / int(sizeof(T))> pack_of(const Pack<uint32_t, W>& words) {
    Pack<T, W * 4 / int(sizeof(T))> pack;
    memcpy(static_cast<void*>(&pack), &words, sizeof(pack));
    return pack;
}
template <int W> NF_DEVICE Pack<uint32_t, W> opaque(Pack<uint32_t, W> words) {
    NF_ON_DEVICE(NF_UNROLL for (int k = 0; k < W; ++k) asm volatile("" : "+r"(words.data[k]));)
    return words;
}

// Of an index in two parts, the low of which has stepped to ``limit`` or beyond, or below zero: three instructions, where the compiler,
// which selects the numbers to add, takes five
NF_DEVICE void carry(int& low, int limit, int& high, int step) {
    NF_EMULATED(if (low >= limit) low -= limit, high += step;)
    NF_ON_DEVICE(
        asm("{\n\t.reg .pred due;\n\tsetp.ge.s32 due, %0, %2;\n\t@due sub.s32 %0, %0, %2;\n\t@due add.s32 %1, %1, %3;\n\t}" : "+r"(low),
            "+r"(high) : "r"(limit), "r"(step));)
}
NF_DEVICE void borrow(int& low, int limit, int& high, int step) {
    NF_EMULATED(if (low < 0) low += limit, high -= step;)
    NF_ON_DEVICE(
        asm("{\n\t.reg .pred due;\n\tsetp.lt.s32 due, %0, 0;\n\t@due add.s32 %0, %0, %2;\n\t@due sub.s32 %1, %1, %3;\n\t}" : "+r"(low),
            "+r"(high) : "r"(limit), "r"(step));)
}

// --------------------------------------------------------------------------------------------------------------------------- maths

// The float overloads of exp_, exp_of_minus_ and reciprocal_fast_ are fast: exponentials are off by at most 2 + |1.17 x| units in the last
// place (0 and inf beyond the range), the reciprocal by 1. The others are as good as the CUDA maths library: 0 to 2 units, 1 for tanh_ and
// erf_.

// min_ and max_ drop a NaN: only both NaN give NaN.
NF_HOST_DEVICE float fma_(float a, float b, float c) { return ::fmaf(a, b, c); }
NF_HOST_DEVICE double fma_(double a, double b, double c) { return ::fma(a, b, c); }
NF_DEVICE float exp_(float x) { NF_ON_DEVICE(return __expf(x);) NF_EMULATED(return ::expf(x);) }
NF_DEVICE double exp_(double x) { return ::exp(x); }
NF_HOST_DEVICE float expm1_(float x) { return ::expm1f(x); }
NF_HOST_DEVICE double expm1_(double x) { return ::expm1(x); }
NF_HOST_DEVICE float log1p_(float x) { return ::log1pf(x); }
NF_HOST_DEVICE double log1p_(double x) { return ::log1p(x); }
NF_HOST_DEVICE float erf_(float x) { return ::erff(x); }
NF_HOST_DEVICE double erf_(double x) { return ::erf(x); }
NF_HOST_DEVICE float tanh_(float x) { return ::tanhf(x); }
NF_HOST_DEVICE double tanh_(double x) { return ::tanh(x); }
NF_HOST_DEVICE float sqrt_(float x) { return ::sqrtf(x); }
NF_HOST_DEVICE double sqrt_(double x) { return ::sqrt(x); }
// 1/sqrt(x): the fast one and a Newton step, within a unit in the last place; NaN for 0
NF_HOST_DEVICE float reciprocal_sqrt_(float x) {
    NF_ON_DEVICE(float r = rsqrtf(x);)
    NF_EMULATED(float r = 1.0f / ::sqrtf(x);)
    return r * ::fmaf(-0.5f * x * r, r, 1.5f);
}
NF_HOST_DEVICE double reciprocal_sqrt_(double x) { return 1.0 / ::sqrt(x); }
NF_HOST_DEVICE float abs_(float x) { return ::fabsf(x); }
NF_HOST_DEVICE double abs_(double x) { return ::fabs(x); }
NF_HOST_DEVICE float min_(float a, float b) { return ::fminf(a, b); }
NF_HOST_DEVICE double min_(double a, double b) { return ::fmin(a, b); }
NF_HOST_DEVICE float max_(float a, float b) { return ::fmaxf(a, b); }
NF_HOST_DEVICE double max_(double a, double b) { return ::fmax(a, b); }
// max_ that keeps a NaN
NF_DEVICE float max_nan_(float a, float b) {
    NF_EMULATED(return a > b || a != a ? a : b;)
#ifndef NF_EMULATION
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#endif
}
NF_DEVICE double max_nan_(double a, double b) { return a > b || a != a ? a : b; }
// exp(-x), where denormal results are zero, and 1/x, where those of |x| > 2^126 are: two instructions and one
NF_DEVICE float exp_of_minus_(float x) {
    NF_EMULATED(return ::exp2f(x * -1.4426950408889634f);)
#ifndef NF_EMULATION
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
    return e;
#endif
}
NF_DEVICE double exp_of_minus_(double x) { return ::exp(-x); }
NF_DEVICE float reciprocal_fast_(float x) {
    NF_EMULATED(return 1.0f / x;)
#ifndef NF_EMULATION
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#endif
}
NF_DEVICE double reciprocal_fast_(double x) { return 1.0 / x; }
NF_HOST_DEVICE float reciprocal_(float x) { return 1.0f / x; }
NF_HOST_DEVICE double reciprocal_(double x) { return 1.0 / x; }

}  // namespace normfused
