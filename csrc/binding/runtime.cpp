#include "runtime.h"

#include <algorithm>
#include <atomic>

#include "interface.h"

#ifdef NF_EMULATION
#include <cstdlib>

extern "C" {  // csrc/emulation/simt.h; weak, so that the build can be tested without it
__attribute__((weak)) const char* nf_emulation_message();
__attribute__((weak)) void nf_emulation_limits(int processors, int shared_bytes, int shared_bytes_of_processor);
}
#else
#include <cuda_runtime_api.h>

#include <array>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#endif

#ifndef NF_ARCHITECTURES
#define NF_ARCHITECTURES "unknown"
#endif

namespace normfused {

static const char no_plan[] =
    "the kernels have no plan for it (more than 2^32 elements of a sample normalized along dim 1, groups among 2^20 or more channels in "
    "channels_last, or 2^31 blocks); use backend='triton' or 'torch' for this call";

#ifdef NF_EMULATION

namespace {
bool pool_is_empty = false;

uint32_t* zeroed_words(size_t words) { return static_cast<uint32_t*>(std::calloc(words, sizeof(uint32_t))); }

Device& the_device() {
    static Device device(zeroed_words);
    return device;
}

int runtime_version() { return 0; }
int driver_version() { return 0; }
}  // namespace

const char* error_string(int status) {
    if (status == ok) return "no error";
    if (status == not_supported) return no_plan;
    return nf_emulation_message != nullptr ? nf_emulation_message() : "the emulation failed";
}

Device* device_at(int, int& status) {
    status = ok;
    return &the_device();
}

uint32_t* take_arrivals(Device& device, void* stream, uint32_t words) {
    return pool_is_empty ? nullptr : device.arrivals.take(stream, words, false);
}

bool is_current(int) { return true; }

void pretend(const Limits& limits, bool pool) {
    the_device().limits = limits;
    if (nf_emulation_limits != nullptr)
        nf_emulation_limits(limits.processors, limits.shared_bytes_per_block, limits.shared_bytes_per_processor);
    pool_is_empty = !pool;
}

#else

namespace {
// Zeroed on a stream of its own, which may be done while another thread captures, unlike all work on the legacy stream.
uint32_t* zeroed_words(size_t words) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) return nullptr;
    void* data = nullptr;
    cudaStream_t stream = nullptr;
    bool zeroed = cudaMalloc(&data, words * sizeof(uint32_t)) == cudaSuccess &&
                  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
                  cudaMemsetAsync(data, 0, words * sizeof(uint32_t), stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess;
    if (stream != nullptr) cudaStreamDestroy(stream);
    if (!zeroed) {
        if (data != nullptr) cudaFree(data);
        cudaGetLastError();  // running without a pool is no error: the next launch must not find this one
        data = nullptr;
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return static_cast<uint32_t*>(data);
}

// Code for 8.0 that the driver translates for a newer device stops at the first barrier of a cluster (device.cuh)
bool compiled_with_clusters(int index) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess)
        return false;
    std::istringstream list(NF_ARCHITECTURES);
    for (std::string word; list >> word;) {
        int of = 0, point = 0;
        if (std::sscanf(word.c_str(), "%d.%d", &of, &point) != 2) continue;
        // machine code runs within its generation, PTX on all that is newer
        const bool newer = of < major && word.find("+PTX") != std::string::npos;
        if (of >= 9 && (newer || (of == major && point <= minor))) return true;
    }
    return false;
}

int ask_limits(int index, Limits& limits) {
    struct Question {
        cudaDeviceAttr attribute;
        int* answer;
    };
    for (Question q : {Question{cudaDevAttrMultiProcessorCount, &limits.processors},
                       Question{cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.shared_bytes_per_block},
                       Question{cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.shared_bytes_per_processor},
                       Question{cudaDevAttrMaxThreadsPerMultiProcessor, &limits.threads_per_processor}}) {
        const cudaError_t status = cudaDeviceGetAttribute(q.answer, q.attribute, index);
        if (status != cudaSuccess) return status;
    }
    int clusters = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
    if (status != cudaSuccess) return status;
    if (!clusters || !compiled_with_clusters(index)) limits.largest_cluster = 1;
    return ok;
}

int runtime_version() {
    int version = 0;
    cudaRuntimeGetVersion(&version);
    return version;
}

int driver_version() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}
}  // namespace

Device* device_at(int index, int& status) {
    static std::mutex mutex;
    static std::array<std::unique_ptr<Device>, 256> devices;  // torch's device index has 8 bits
    status = ok;
    if (index < 0 || index >= static_cast<int>(devices.size())) {
        status = cudaErrorInvalidDevice;
        return nullptr;
    }
    std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Device>& device = devices[static_cast<size_t>(index)];
    if (device == nullptr) {
        auto fresh = std::make_unique<Device>(zeroed_words);
        status = ask_limits(index, fresh->limits);
        if (status != ok) return nullptr;
        device = std::move(fresh);
    }
    return device.get();
}

uint32_t* take_arrivals(Device& device, void* stream, uint32_t words) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    // An error here means that the capture is broken; the launch that follows reports it
    if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture) != cudaSuccess) return nullptr;
    return device.arrivals.take(stream, words, capture != cudaStreamCaptureStatusNone);
}

bool is_current(int index) {
    int current = -1;
    return cudaGetDevice(&current) == cudaSuccess && current == index;
}

const char* error_string(int status) {
    if (status == ok) return "no error";
    if (status == not_supported) return no_plan;
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

#endif

namespace {
std::atomic<int> spare{0};

int limits_of(int index, Limits* limits) {
    int status = ok;
    if (const Device* device = device_at(index, status)) *limits = limits_now(*device);
    return status;
}

const Interface interface{
    interface_version, NF_ARCHITECTURES, runtime_version, driver_version, error_string, limits_of, requirements, describe,
};
}  // namespace

Limits limits_now(const Device& device) {
    Limits limits = device.limits;
    limits.spare_processors = std::max(limits.spare_processors, std::min(spare.load(std::memory_order_relaxed), limits.processors - 1));
    return limits;
}

void spare_processors(int count) { spare = count; }

}  // namespace normfused

const normfused::Interface* normfused_interface() { return &normfused::interface; }
