// A SIMT machine on a CPU, as far as device.cuh asks for one: each thread of a launch is a fiber that runs until it must wait.
//
// Memory is sequentially consistent and nothing takes time, so that a missing fence, a wrong cache hint or a slow kernel does not show.
// What shows: every access outside of a declared tensor or a shared view, misaligned packs, stores to read-only tensors, barriers and
// shuffles that diverge, deadlocks, races (on demand), data read before its copy was awaited, and how many sectors were asked for (on
// demand). The first fault ends its launch with one line of text. Launches of several host threads run one after another; each host
// thread declares tensors for its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace normfused {
namespace simt {

constexpr int failed = -2;  // what launch() returns after a fault

enum class Touch { read, read_only, write };

struct Thread {
    void* context = nullptr;  // of the fiber, while it does not run
    unsigned index = 0, block_index = 0, lane = 0;
    struct Warp* warp = nullptr;
    struct Block* block = nullptr;
    const char* shared = nullptr;  // the block's
    struct Asynchronous* asynchronous = nullptr;
    const char* waits_in = nullptr;
    Site waits_at = {};
    uint32_t segment = 0, segment_epoch = 0;
};

struct Grid {
    const char* name;
    unsigned blocks, threads, shared_bytes, cluster;
    bool cooperative;
};

// Elements [first, first + n) of a shared view
struct View {
    void* at;
    int first, n, count, size;
};

#define NF_HIDDEN __attribute__((visibility("hidden")))  // spares an indirection in a shared library
extern NF_HIDDEN Thread* current;
extern NF_HIDDEN Grid grid;
extern NF_HIDDEN bool watching;  // races or traffic

int launch(const LaunchConfig& config, bool impossible, void (*call)(const void*), const void* kernel_and_arguments);
const char* message();
void declare(const char* name, const void* pointer, int64_t bytes, bool writable);
void forget_all();

void touch_global(const void* origin, const void* address, unsigned bytes, unsigned element, Touch touch, Site site);
void touch_shared_checked(const View& view, Touch touch, Site site);
void* shared_at(unsigned byte_offset, int64_t bytes, unsigned alignment, Site site);
void* on_block(void* address, unsigned rank, Site site);
void check_part(int first, int count, int of, Site site);

void sync_warp(Site site);
void sync_block(Site site);
bool any_in_block(bool value, Site site);
void sync_cluster(Site site);
void sync_blocks(const void* origin, uint32_t* word, unsigned parties, bool leads, Site site);
bool last_to_arrive(const void* origin, uint32_t* word, unsigned parties, Site site);
uint64_t shuffle(uint64_t bits, unsigned source, Site site);

void copy_async(const View& to, const void* origin, const void* from, Site site);
void copy_async_commit();
void copy_async_wait(unsigned pending, Site site);
void bulk_init(void* barrier, unsigned arrivals, Site site);
void bulk_expect(void* barrier, unsigned bytes, Site site);
void bulk_wait(void* barrier, unsigned phase, Site site);
void copy_bulk(const View& to, const void* origin, const void* from, void* barrier, Site site);
void copy_bulk_out(const View& from, const void* origin, void* to, Site site);
void copy_bulk_commit();
void copy_bulk_wait(unsigned pending, Site site);

inline void touch_shared(const void* at, int i, int n, int count, int size, Touch touch, Site site) {
    const auto offset = static_cast<const char*>(at) - current->shared + int64_t(i) * size;
    const unsigned bytes = unsigned(n) * size, width = bytes < 16 ? bytes : 16;
    if (watching || i < 0 || i > count - n || uint64_t(offset) >= grid.shared_bytes || offset % width != 0)
        touch_shared_checked({const_cast<void*>(at), i, n, count, size}, touch, site);
}

}  // namespace simt
}  // namespace normfused

// Control, by ctypes or from C++. None of it may be called while a launch runs.
#pragma GCC visibility push(default)
extern "C" {
enum { nf_order_forward, nf_order_reverse, nf_order_starve };

// In which order fibers run. starve: warps of several blocks with priorities drawn from the seed, so that some lag as far as barriers let.
void nf_emulation_order(int order, unsigned seed);
void nf_emulation_races(int on);    // also: shared memory that nobody wrote, copies not awaited
void nf_emulation_traffic(int on);  // count what is asked of memory
void nf_emulation_launches(int on);  // 0: launches return at once, to time what surrounds them
// Of the device: processors, shared bytes that a block may have, and that a processor has. A cooperative grid must fit into them.
void nf_emulation_limits(int processors, int shared_bytes, int shared_bytes_of_processor);
void nf_emulation_largest_cluster(int blocks);
void nf_emulation_reset();          // forgets the message, counters and sites; modes and skipped sites stay
const char* nf_emulation_message();  // of the last fault since reset, or ""

// Since reset: requests of warps, bytes, 32-byte sectors summed over requests, distinct sectors; of reads, then of writes. 1, or 0 for a
// tensor never touched. All tensors together: "".
int nf_emulation_counters(const char* tensor, long long out[8]);
// The same and more as JSON: {"launches", "tensors": {name: {...}}, "shared": {"requests", "wavefronts", "least_wavefronts"}, "kernels":
// [{"kernel", "blocks", ..., "tensors", "shared"}]}; kernels are listed while traffic is counted. Valid until the next call.
const char* nf_emulation_tensors();

// Makes the barriers and waits at a line do nothing (line 0: none). What a test should notice. Not any_in_block and last_to_arrive, whose
// callers need the value.
void nf_emulation_skip(const char* file_suffix, int line);
// The barriers and waits met since reset, as JSON: [{"file", "line", "what"}]. Valid until the next call.
const char* nf_emulation_sites();
}
#pragma GCC visibility pop
