// The machine of simt.h. In order: fibers, tensors, faults, the race check, traffic, barriers, copies, launches, control.
#include "../kernels/device.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(NF_UCONTEXT)
#define NF_UCONTEXT
#endif
#ifdef NF_UCONTEXT
#include <ucontext.h>
#endif

namespace normfused {
namespace simt {

Thread* current;
Grid grid;
bool watching;

namespace {

// ------------------------------------------------------------------------------------------------------------------------- fibers

void fiber();  // what each runs

constexpr size_t stack_bytes = 32 * 1024, page = 4096, stacks_of_chunk = 64;
constexpr size_t guarded_stacks = 16 * 1024;  // each guard page is a mapping of its own, and their number is limited

std::vector<char*> stacks;  // tops; kept between launches

void provide_stacks(size_t count) {
    while (stacks.size() < count) {
        const size_t each = stack_bytes + page;
        void* chunk = mmap(nullptr, each * stacks_of_chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (chunk == MAP_FAILED) std::fprintf(stderr, "simt: no memory for stacks\n"), std::abort();
        for (size_t k = 0; k < stacks_of_chunk; ++k) {
            char* low = static_cast<char*>(chunk) + k * each;
            if (stacks.size() < guarded_stacks) mprotect(low, page, PROT_NONE);
            stacks.push_back(low + each - (stacks.size() % 16) * 192);  // or all tops would fall into the same sets of the cache
        }
    }
}

#ifdef NF_UCONTEXT
std::vector<std::unique_ptr<ucontext_t>> contexts;
void* main_context;

void* prepare(size_t slot) {
    if (contexts.size() <= slot) contexts.resize(slot + 1);
    if (!contexts[slot]) contexts[slot] = std::make_unique<ucontext_t>();
    ucontext_t* context = contexts[slot].get();
    getcontext(context);
    context->uc_stack.ss_sp = stacks[slot] - (stack_bytes - 16 * 192);
    context->uc_stack.ss_size = stack_bytes - 16 * 192;
    makecontext(context, fiber, 0);
    return context;
}
void switch_context(void** from, void* to) {
    static ucontext_t origin;
    if (from == &main_context) *from = &origin;
    swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#else
void* main_context;

// Registers that a callee must keep; the floating-point modes are the same in all fibers
extern "C" NF_HIDDEN void nf_switch_context(void** from, void* to);
asm(R"(
    .text
    .p2align 4
    .hidden nf_switch_context
    .globl nf_switch_context
    .type nf_switch_context, @function
nf_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size nf_switch_context, .-nf_switch_context
)");
void switch_context(void** from, void* to) { nf_switch_context(from, to); }

void* prepare(size_t slot) {
    auto top = reinterpret_cast<uintptr_t>(stacks[slot]) & ~uintptr_t(15);
    auto words = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and the return address that it will never use
    std::fill(words, words + 8, nullptr);
    words[6] = reinterpret_cast<void*>(fiber);
    return words;
}
#endif

}  // namespace

// -------------------------------------------------------------------------------------------------------------- what a launch is of

struct Segment {  // the accesses of a thread between two barriers
    uint32_t thread, warp_epoch, block_epoch, cluster_epoch;
};
struct Cell {  // the last accesses of some bytes, by segment; 0: none
    uint32_t writer = 0, reader = 0, other_reader = 0;
    uint16_t writer_site = 0, reader_site = 0, other_reader_site = 0;
    bool pending = false;  // a copy into it is under way
};
struct Shadow {
    unsigned granule = 0;  // bytes of a cell: the smallest element met
    std::vector<Cell> cells;
};

struct Counts {
    long long requests = 0, bytes = 0, sectors = 0, distinct = 0;
};
struct Asked {  // of one tensor: reads, writes
    Counts counts[2];
    std::vector<uint64_t> seen[2];  // a bit per sector
};

struct Tensor {
    std::string name;
    uintptr_t begin;
    int64_t bytes;
    bool writable, overlaps_writable = false;
    Tensor* memory = nullptr;  // the largest tensor that contains it, first declared: names of the same memory share its shadow
    Shadow shadow;
    Asked asked;
};
static thread_local std::vector<std::unique_ptr<Tensor>> tensors;

constexpr uint32_t initialised = 1;  // the segment of what a bulk copy wrote: ordered before all who may read it

struct Group {  // the accesses of a warp at one place that are one request
    uint32_t mask = 0;
    uintptr_t address[32];
};
struct Visits {  // of a warp to one call site since its last barrier
    uint16_t site;
    bool write;
    uint8_t bytes;
    Tensor* tensor;  // null: shared memory
    uint16_t times[32];
    std::vector<Group> groups;
};

struct Warp {
    uint32_t members = 0, ready = 0, arrived = 0, in_block = 0, exited = 0;  // lanes; in_block: waiting for more than the warp
    unsigned rank = 0, turn = 0;                                             // order of warps, and of lanes
    const char* what = nullptr;
    Site site = {};
    uint32_t epoch = 0;
    uint64_t values[32], results[32];
    unsigned sources[32];
    Thread* threads = nullptr;
    std::vector<Visits> visits;
};

struct Copy {
    char* to;
    const char* from;
    unsigned bytes, group;
    Tensor* tensor;
    Site site;
};
struct Bulk {  // the state of an mbarrier
    void* at;
    unsigned arrivals;
    int pending;
    int64_t expected;  // bytes yet to come
    unsigned phase;
    std::vector<Copy> copies;
    std::vector<Thread*> waiting;
};
struct Asynchronous {  // of a thread
    std::vector<Copy> in, out;
    unsigned in_groups = 0, out_groups = 0;
};

using Clock = std::unordered_map<unsigned, uint32_t>;  // block to its epoch: what it did before then has been seen

struct Block {
    unsigned index = 0, arrived = 0, exited = 0;
    const char* what = nullptr;
    Site site = {};
    bool any = false, result = false;
    uint32_t epoch = 0;
    uint32_t* word = nullptr;
    unsigned parties = 0;
    bool leads = false;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    char* shared = nullptr;
    Shadow shadow;
    std::vector<Bulk> bulks;
    std::unordered_map<unsigned, Asynchronous> asynchronous;
    Clock acquired;
    struct Cluster* cluster = nullptr;
    bool read_by_others = false;  // since the cluster's last barrier
    Site read_at = {};
};
struct Cluster {
    unsigned arrived = 0, exited = 0;
    uint32_t epoch = 0;
    std::vector<Block> blocks;
    std::unique_ptr<char, decltype(&std::free)> shared{nullptr, std::free};
    size_t shared_bytes = 0;
    size_t slot = 0;
};

struct Meeting {  // of blocks at a word
    std::vector<Block*> blocks;
    unsigned parties = 0, leaders = 0;
};

struct Memory {  // requests to shared memory
    long long requests = 0, wavefronts = 0, least = 0;
};

static struct {
    std::mutex mutex;
    // modes
    int order = nf_order_forward;
    unsigned seed = 0;
    bool races = false, traffic = false;
    bool launching = true;
    int processors = 132, shared_limit = 232448, shared_of_processor = 233472, largest_cluster = 8;
    std::string skip_file;
    int skip_line = 0;
    // the launch
    void (*call)(const void*);
    const void* kernel_and_arguments;
    std::vector<std::unique_ptr<Cluster>> resident;
    std::vector<uint64_t> ready;  // a bit per rank
    std::vector<Warp*> by_rank;
    std::vector<unsigned> ranks;  // of the warps of all slots
    bool any_rank;  // whether the next warp is to be chosen anew
    unsigned exited = 0;  // blocks
    std::unordered_map<uint32_t*, Meeting> meetings;
    std::vector<uint32_t*> words;  // of arrivals so far
    unsigned finished;                 // resident clusters of which all threads have left
    bool fault;
    std::mt19937 random;
    std::vector<Segment> segments;
    std::map<uint32_t*, Clock> released;
    Memory shared;
    // since reset
    std::string text, answer;
    long long launches = 0;
    std::map<std::string, Asked> totals;
    std::map<std::string, uintptr_t> bases;  // of the tensors when counted last
    Memory shared_total;
    std::string kernels;  // as JSON
} machine;

namespace {

// ------------------------------------------------------------------------------------------------------------------------- faults

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* pattern, ...) {
    char text[1024];
    va_list list;
    va_start(list, pattern);
    std::vsnprintf(text, sizeof text, pattern, list);
    va_end(list);
    return text;
}
const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}
std::string at(Site site) { return format("%s:%d", base_name(site.file), site.line); }

void note(const std::string& text) {
    machine.text = text;
    machine.fault = true;
}

// Ends the launch: nobody returns to the fibers
[[noreturn]] void fault(Site site, const std::string& what) {
    note(
        format("%s: %s (kernel %s, block %u, thread %u)", at(site).c_str(), what.c_str(), grid.name, current->block_index, current->index));
    void* forgotten = current->context;
    current = nullptr;
    switch_context(&forgotten, main_context);
    std::abort();
}

// -------------------------------------------------------------------------------------------------------------------------- sites

struct Met {
    Site site;
    const char* what;
    bool skipped;
};
std::vector<Met> met;  // barriers and waits since reset
struct Recent {
    Site site;
    bool skipped;
} recent[64];

bool ends_with(const char* text, const std::string& end) {
    const size_t n = std::strlen(text);
    return n >= end.size() && std::strcmp(text + n - end.size(), end.c_str()) == 0;
}

size_t hash(Site site) { return (reinterpret_cast<uintptr_t>(site.file) >> 3) * 31 + site.line; }

// Notes that a barrier or a wait was met; whether it is to do nothing
bool skipped(const char* what, Site site) {
    Recent& entry = recent[hash(site) % 64];
    if (entry.site.file == site.file && entry.site.line == site.line) return entry.skipped;
    auto known = std::find_if(met.begin(), met.end(), [&](const Met& m) {
        return m.site.line == site.line && m.what == what && std::strcmp(m.site.file, site.file) == 0;
    });
    if (known == met.end()) {
        const bool skip = machine.skip_line == site.line && ends_with(site.file, machine.skip_file);
        known = met.insert(met.end(), {site, what, skip});
    }
    entry = {site, known->skipped};
    return known->skipped;
}
void forget_sites() {
    met.clear();
    std::fill(std::begin(recent), std::end(recent), Recent{});
}

// Small numbers for call sites, within a launch
std::vector<Site> sites;
struct {
    Site site;
    uint16_t number;
} recent_numbers[64];

uint16_t number_of(Site site) {
    auto& entry = recent_numbers[hash(site) % 64];
    if (entry.site.file == site.file && entry.site.line == site.line) return entry.number;
    auto known = std::find_if(sites.begin(), sites.end(), [&](Site s) { return s.line == site.line && s.file == site.file; });
    entry = {site, static_cast<uint16_t>(known - sites.begin())};
    if (known == sites.end()) sites.push_back(site);
    return entry.number;
}

// ------------------------------------------------------------------------------------------------------------------------- races

uint32_t segment_of(Thread& thread) {
    const Warp& warp = *thread.warp;
    if (thread.segment == 0 || thread.segment_epoch != warp.epoch) {
        const Block& block = *thread.block;
        machine.segments.push_back({block.index * grid.threads + thread.index, warp.epoch, block.epoch, block.cluster->epoch});
        thread.segment = static_cast<uint32_t>(machine.segments.size() - 1);
        thread.segment_epoch = warp.epoch;
    }
    return thread.segment;
}

bool same_warp(uint32_t thread, uint32_t other) {
    return thread / grid.threads == other / grid.threads && thread % grid.threads / 32 == other % grid.threads / 32;
}

// Whether a barrier, or the count of arrivals, orders an earlier access before what the thread does now
bool ordered(uint32_t earlier, const Thread& thread) {
    if (earlier <= initialised) return true;
    const Segment& segment = machine.segments[earlier];
    const Block& block = *thread.block;
    const uint32_t self = block.index * grid.threads + thread.index;
    if (segment.thread == self) return true;
    const unsigned other = segment.thread / grid.threads;
    if (other == block.index)
        return block.epoch > segment.block_epoch || (same_warp(segment.thread, self) && thread.warp->epoch > segment.warp_epoch);
    if (other / grid.cluster == block.index / grid.cluster && block.cluster->epoch > segment.cluster_epoch) return true;
    auto seen = block.acquired.find(other);
    return seen != block.acquired.end() && seen->second > segment.block_epoch;
}

void prepare(Shadow& shadow, int64_t bytes, unsigned element) {
    if (shadow.granule == 0) {
        shadow.granule = element;
        shadow.cells.assign((bytes + element - 1) / element, Cell());
    }
    if (element < shadow.granule) {
        const unsigned times = shadow.granule / element;
        std::vector<Cell> finer;
        finer.reserve(shadow.cells.size() * times);
        for (const Cell& cell : shadow.cells) finer.insert(finer.end(), times, cell);
        shadow.cells.swap(finer);
        shadow.granule = element;
    }
}

[[noreturn]] void race(const char* now, const char* before, uint32_t segment, uint16_t site, const std::string& where, Site here) {
    const uint32_t thread = machine.segments[segment].thread;
    fault(here, format("race: this %s of %s is not ordered with the %s at %s by block %u, thread %u", now, where.c_str(), before,
                       at(sites[site]).c_str(), thread / grid.threads, thread % grid.threads));
}

template <class Where>
void check_races(Shadow& shadow, int64_t offset, unsigned bytes, bool write, bool pending, bool must_be_written, Site site, Where where) {
    const uint32_t mine = segment_of(*current);
    const uint16_t number = number_of(site);
    const uint32_t self = machine.segments[mine].thread;
    for (int64_t k = offset / shadow.granule; k <= (offset + bytes - 1) / shadow.granule; ++k) {
        Cell& cell = shadow.cells[k];
        const char* verb = write ? "store" : "load";
        if (cell.writer != mine && !ordered(cell.writer, *current))
            race(verb, cell.pending ? "copy" : "store", cell.writer, cell.writer_site, where(k * shadow.granule), site);
        if (write) {
            if (!ordered(cell.reader, *current)) race(verb, "load", cell.reader, cell.reader_site, where(k * shadow.granule), site);
            if (!ordered(cell.other_reader, *current))
                race(verb, "load", cell.other_reader, cell.other_reader_site, where(k * shadow.granule), site);
            cell = Cell();
            cell.writer = mine;
            cell.writer_site = number;
            cell.pending = pending;
        } else {
            if (cell.pending)
                fault(site, format("load of %s, into which the copy at %s is not awaited", where(k * shadow.granule).c_str(),
                                   at(sites[cell.writer_site]).c_str()));
            if (must_be_written && cell.writer == 0)
                fault(site, format("load of %s, which nobody wrote", where(k * shadow.granule).c_str()));
            if (cell.reader == mine) continue;
            // Two readers are kept, of different warps if possible
            if (cell.reader && machine.segments[cell.reader].thread != self && !ordered(cell.reader, *current) &&
                (!same_warp(machine.segments[cell.reader].thread, self) || ordered(cell.other_reader, *current))) {
                cell.other_reader = cell.reader;
                cell.other_reader_site = cell.reader_site;
            }
            cell.reader = mine;
            cell.reader_site = number;
        }
    }
}

// ----------------------------------------------------------------------------------------------------------------------- traffic

void mark(std::vector<uint64_t>& seen, Counts& counts, uint64_t sector) {
    uint64_t& word = seen[sector / 64];
    const uint64_t bit = uint64_t(1) << sector % 64;
    counts.distinct += !(word & bit);
    word |= bit;
}

void count_sectors(Tensor& tensor, bool write, const uintptr_t* addresses, uint32_t mask, unsigned bytes) {
    Counts& counts = tensor.asked.counts[write];
    auto& seen = tensor.asked.seen[write];
    if (seen.empty()) seen.resize((tensor.bytes + 31) / 32 / 64 + 2);
    uint64_t sectors[64];
    int n = 0;
    for (; mask; mask &= mask - 1) {
        const uintptr_t first = addresses[__builtin_ctz(mask)];
        counts.bytes += bytes;
        for (uint64_t s = first / 32; s <= (first + bytes - 1) / 32; ++s)
            if (n == 0 || sectors[n - 1] != s) sectors[n++] = s;
    }
    std::sort(sectors, sectors + n);
    n = static_cast<int>(std::unique(sectors, sectors + n) - sectors);
    ++counts.requests;
    counts.sectors += n;
    for (int k = 0; k < n; ++k) mark(seen, counts, sectors[k] - tensor.begin / 32);
}

void count_range(Tensor& tensor, bool write, const void* address, unsigned bytes) {
    Counts& counts = tensor.asked.counts[write];
    auto& seen = tensor.asked.seen[write];
    if (seen.empty()) seen.resize((tensor.bytes + 31) / 32 / 64 + 2);
    const auto first = reinterpret_cast<uintptr_t>(address);
    ++counts.requests;
    counts.bytes += bytes;
    for (uint64_t s = first / 32; s <= (first + bytes - 1) / 32; ++s, ++counts.sectors) mark(seen, counts, s - tensor.begin / 32);
}

// 32 banks of 4 bytes; 8-byte accesses are served a half warp at a time, 16-byte ones a quarter
void count_wavefronts(const Group& group, unsigned bytes) {
    const unsigned lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, words = bytes <= 4 ? 1 : bytes / 4;
    ++machine.shared.requests;
    static uintptr_t met[32][32];  // not on the fiber's stack
    for (unsigned first = 0; first < 32; first += lanes) {
        unsigned met_in[32] = {}, worst = 0;
        for (unsigned lane = first; lane < first + lanes; ++lane) {
            if (!(group.mask >> lane & 1)) continue;
            for (unsigned k = 0; k < words; ++k) {
                const uintptr_t word = group.address[lane] / 4 + k;
                unsigned& n = met_in[word % 32];
                uintptr_t* bank = met[word % 32];
                if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
                worst = std::max(worst, n);
            }
        }
        machine.shared.wavefronts += worst;
        machine.shared.least += worst > 0;
    }
}

void finish(const Visits& visits, const Group& group) {
    if (visits.tensor) count_sectors(*visits.tensor, visits.write, group.address, group.mask, visits.bytes);
    else count_wavefronts(group, visits.bytes);
}

// Lanes do not run together: the accesses of a warp between two of its barriers belong together by call site and by how many times each
// lane has been there.
void count_access(Tensor* tensor, bool write, const void* address, unsigned bytes, Site site) {
    Warp& warp = *current->warp;
    const uint16_t number = number_of(site);
    auto visits = std::find_if(warp.visits.begin(), warp.visits.end(), [&](const Visits& v) {
        return v.site == number && v.tensor == tensor && v.write == write && v.bytes == bytes;
    });
    if (visits == warp.visits.end()) {
        warp.visits.push_back({number, write, static_cast<uint8_t>(bytes), tensor, {}, {}});
        visits = warp.visits.end() - 1;
    }
    const unsigned time = visits->times[current->lane]++;
    if (visits->groups.size() <= time) visits->groups.emplace_back();
    Group& group = visits->groups[time];
    group.mask |= 1u << current->lane;
    group.address[current->lane] = reinterpret_cast<uintptr_t>(address);
}

// Nobody can join the requests made before a barrier
void flush(Warp& warp) {
    for (Visits& visits : warp.visits) {
        for (const Group& group : visits.groups) finish(visits, group);
        visits.groups.clear();
        std::fill(std::begin(visits.times), std::end(visits.times), uint16_t(0));
    }
}

// ------------------------------------------------------------------------------------------------------------------------ tensors

struct {
    const void* origin;
    Tensor* tensor[2];
} recent_tensors[16];

// The smallest that contains it, the first declared of those; for stores, of the writable ones if any
Tensor* find_tensor(const void* origin, bool write) {
    const auto address = reinterpret_cast<uintptr_t>(origin);
    auto better = [&](const Tensor* a, const Tensor* b) {
        if (!b) return true;
        if (write && a->writable != b->writable) return a->writable;
        return a->bytes < b->bytes;
    };
    Tensor* found = nullptr;
    for (auto& tensor : tensors)
        if (address >= tensor->begin && address < tensor->begin + tensor->bytes && better(tensor.get(), found)) found = tensor.get();
    return found;
}
Tensor* tensor_of(const void* origin, bool write) {
    auto& entry = recent_tensors[reinterpret_cast<uintptr_t>(origin) / 64 % 16];
    if (entry.origin != origin) entry = {origin, {find_tensor(origin, false), find_tensor(origin, true)}};
    return entry.tensor[write];
}

std::string place(const Tensor& tensor, int64_t offset, unsigned element) {
    return format("%s[%lld]", tensor.name.c_str(), static_cast<long long>(offset >= 0 ? offset / element : (offset + 1) / element - 1));
}
std::string verb(bool write, unsigned bytes, unsigned element) {
    const char* word = write ? "store" : "load";
    return bytes == element ? word : format("%s of %u elements", word, bytes / element);
}

Tensor& checked_tensor(const void* origin, const void* address, unsigned bytes, unsigned alignment, unsigned element, Touch touch,
                       Site site) {
    const bool write = touch == Touch::write;
    Tensor* tensor = tensor_of(origin, write);
    if (!tensor) fault(site, verb(write, bytes, element) + (origin ? " outside of every declared tensor" : " through a null pointer"));
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) - tensor->begin);
    if (offset < 0 || offset + bytes > tensor->bytes)
        fault(site, format("%s at %s, beyond its %lld elements", verb(write, bytes, element).c_str(),
                           place(*tensor, offset, element).c_str(), static_cast<long long>(tensor->bytes / element)));
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        fault(site, format("%s at %s, misaligned: the address is no multiple of %u bytes", verb(write, bytes, element).c_str(),
                           place(*tensor, offset, element).c_str(), alignment));
    if (write && !tensor->writable) fault(site, format("store to %s, a read-only tensor", place(*tensor, offset, element).c_str()));
    if (touch == Touch::read_only && tensor->overlaps_writable)
        fault(site, format("read-only load of %s, a tensor that the launch may write", place(*tensor, offset, element).c_str()));
    return *tensor;
}

void watch_tensor(Tensor& tensor, const void* address, unsigned bytes, unsigned element, bool write, Site site) {
    if (!machine.races || !tensor.overlaps_writable) return;
    Tensor& memory = *tensor.memory;
    prepare(memory.shadow, memory.bytes, element);
    check_races(memory.shadow, static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) - memory.begin), bytes, write, false, false, site,
                [&](int64_t offset) { return place(tensor, offset - int64_t(tensor.begin - memory.begin), element); });
}

// The block of the cluster whose shared memory this is
Block& owner_of(const void* address, Site site) {
    for (Block& block : current->block->cluster->blocks) {
        auto offset = static_cast<const char*>(address) - block.shared;
        if (offset >= 0 && offset < static_cast<int64_t>(grid.shared_bytes)) return block;
    }
    fault(site, "access to no block's shared memory");
}

void watch_shared(Block& owner, const void* address, unsigned bytes, unsigned element, bool write, bool pending, Site site) {
    if (!machine.races) return;
    prepare(owner.shadow, grid.shared_bytes, element);
    check_races(owner.shadow, static_cast<const char*>(address) - owner.shared, bytes, write, pending, true, site, [&](int64_t offset) {
        return format("byte %lld of block %u's shared memory", static_cast<long long>(offset), owner.index);
    });
}

}  // namespace

void touch_global(const void* origin, const void* address, unsigned bytes, unsigned element, Touch touch, Site site) {
    Tensor& tensor = checked_tensor(origin, address, bytes, bytes < 16 ? bytes : 16, element, touch, site);
    if (!watching) return;
    watch_tensor(tensor, address, bytes, element, touch == Touch::write, site);
    if (machine.traffic)
        for (unsigned done = 0; done < bytes; done += 16)
            count_access(&tensor, touch == Touch::write, static_cast<const char*>(address) + done, std::min(bytes - done, 16u), site);
}

void touch_shared_checked(const View& view, Touch touch, Site site) {
    const bool write = touch == Touch::write;
    const unsigned bytes = unsigned(view.n) * view.size, width = std::min(bytes, 16u);
    const std::string what = verb(write, bytes, view.size);
    if (view.first < 0 || view.first > view.count - view.n)
        fault(site, format("%s at %d, beyond the %d elements of a shared view", what.c_str(), view.first, view.count));
    char* address = static_cast<char*>(view.at) + int64_t(view.first) * view.size;
    Block& owner = owner_of(address, site);
    if ((address - owner.shared) % width)
        fault(site, format("%s at %d of a shared view, misaligned: byte %lld is no multiple of %u", what.c_str(), view.first,
                           static_cast<long long>(address - owner.shared), width));
    if (&owner != current->block) {
        if (owner.cluster->epoch == 0)
            fault(site, format("%s in block %u's shared memory before the cluster's first barrier", what.c_str(), owner.index));
        if (owner.exited) fault(site, format("%s in block %u's shared memory, which has exited", what.c_str(), owner.index));
        owner.read_by_others = true;
        owner.read_at = site;
    }
    if (!watching) return;
    watch_shared(owner, address, bytes, view.size, write, false, site);
    if (machine.traffic && &owner == current->block)
        for (unsigned done = 0; done < bytes; done += 16) count_access(nullptr, write, address + done, std::min(bytes - done, 16u), site);
}

void* shared_at(unsigned byte_offset, int64_t bytes, unsigned alignment, Site site) {
    if (bytes < 0 || byte_offset + bytes > grid.shared_bytes)
        fault(site, format("a shared view of bytes %u to %lld, beyond the launch's %u", byte_offset,
                           static_cast<long long>(byte_offset + bytes), grid.shared_bytes));
    if (byte_offset % alignment) fault(site, format("a shared view at byte %u, no multiple of %u", byte_offset, alignment));
    return const_cast<char*>(current->shared) + byte_offset;
}

void* on_block(void* address, unsigned rank, Site site) {
    Cluster& cluster = *current->block->cluster;
    if (rank >= grid.cluster) fault(site, format("block %u of a cluster of %u", rank, grid.cluster));
    return cluster.blocks[rank].shared + (static_cast<char*>(address) - owner_of(address, site).shared);
}

void check_part(int first, int count, int of, Site site) {
    if (first < 0 || count < 0 || first > of - count)
        fault(site, format("elements %d to %d of a shared view of %d", first, first + count, of));
}

// ---------------------------------------------------------------------------------------------------------------------- scheduling

namespace {

void make_ready(Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    if (lanes) machine.ready[warp.rank / 64] |= uint64_t(1) << warp.rank % 64;
}
void make_unready(Warp& warp, uint32_t lanes) {
    warp.ready &= ~lanes;
    if (!warp.ready) machine.ready[warp.rank / 64] &= ~(uint64_t(1) << warp.rank % 64);
}

Thread* next_thread() {
    Warp* warp = current ? current->warp : nullptr;
    if (!warp || !warp->ready || machine.any_rank) {
        machine.any_rank = false;
        warp = nullptr;
        for (size_t k = 0; k < machine.ready.size() && !warp; ++k)
            if (machine.ready[k]) warp = machine.by_rank[k * 64 + __builtin_ctzll(machine.ready[k])];
        if (!warp) return nullptr;
    }
    const uint32_t ready = warp->ready;
    unsigned lane;
    if (machine.order == nf_order_reverse) {
        lane = 31 - __builtin_clz(ready);
    } else {
        const uint32_t turned = warp->turn ? ready >> warp->turn | ready << (32 - warp->turn) : ready;
        lane = (__builtin_ctz(turned) + warp->turn) & 31;
    }
    return &warp->threads[lane];
}

// Runs others until this thread is ready again
void yield() {
    Thread* self = current;
    Thread* next = next_thread();
    if (next == self) return;
    current = next;
    switch_context(&self->context, next ? next->context : main_context);
}

void wait(const char* what, Site site) {
    current->waits_in = what;
    current->waits_at = site;
    yield();
    current->waits_in = nullptr;
}

// ------------------------------------------------------------------------------------------------------------------------ barriers

std::string lanes_text(uint32_t lanes) {
    const int first = __builtin_ctz(lanes);
    return __builtin_popcount(lanes) == 1 ? format("lane %d", first) : format("%d lanes from %d on", __builtin_popcount(lanes), first);
}

// The last lane of a warp to come calls ``complete`` and lets all go on
template <class Complete> void meet_in_warp(const char* what, Site site, Complete complete) {
    Warp& warp = *current->warp;
    const uint32_t self = 1u << current->lane;
    if (warp.exited) fault(site, format("%s, but %s of the warp exited", what, lanes_text(warp.exited).c_str()));
    if (warp.in_block)
        fault(site, format("divergent: %s, with %s of the warp waiting in %s at %s", what, lanes_text(warp.in_block).c_str(),
                           current->block->what, at(current->block->site).c_str()));
    if (warp.arrived == 0) {
        warp.what = what;
        warp.site = site;
    } else if (warp.what != what || warp.site.line != site.line || warp.site.file != site.file) {
        fault(site, format("divergent: %s, with %s of the warp waiting in %s at %s", what, lanes_text(warp.arrived).c_str(), warp.what,
                           at(warp.site).c_str()));
    }
    warp.arrived |= self;
    if (warp.arrived == warp.members) {
        warp.arrived = 0;
        complete(warp);
        if (machine.traffic) flush(warp);
        make_ready(warp, warp.members);
    } else {
        make_unready(warp, self);
    }
    wait(what, site);
}

void release(Block& block) {
    block.arrived = 0;
    ++block.epoch;
    for (Warp& warp : block.warps) {
        ++warp.epoch;
        warp.in_block = 0;
        if (machine.traffic) flush(warp);
        make_ready(warp, warp.members);
    }
    machine.any_rank = true;
}
void release(Cluster& cluster) {
    cluster.arrived = 0;
    ++cluster.epoch;
    for (Block& block : cluster.blocks) {
        block.read_by_others = false;
        release(block);
    }
}

// The last thread of a block to come calls ``complete``, which releases the block, now or later
template <class Complete> void meet_in_block(const char* what, Site site, Complete complete) {
    Warp& warp = *current->warp;
    Block& block = *current->block;
    const uint32_t self = 1u << current->lane;
    if (block.exited) fault(site, format("%s, but %u threads of the block have exited", what, block.exited));
    if (warp.arrived)
        fault(site, format("divergent: %s, with %s of the warp waiting in %s at %s", what, lanes_text(warp.arrived).c_str(), warp.what,
                           at(warp.site).c_str()));
    if (block.arrived == 0) {
        block.what = what;
        block.site = site;
    } else if (block.what != what || block.site.line != site.line || block.site.file != site.file) {
        fault(site, format("divergent: %s, while %u threads of the block wait in %s at %s", what, block.arrived, block.what,
                           at(block.site).c_str()));
    }
    warp.in_block |= self;
    make_unready(warp, self);
    if (++block.arrived == grid.threads) complete(block);
    wait(what, site);
}

void merge(Clock& clock, const Clock& other) {
    for (auto& entry : other) {
        uint32_t& epoch = clock[entry.first];
        epoch = std::max(epoch, entry.second);
    }
}

}  // namespace

void sync_warp(Site site) {
    static const char what[] = "sync_warp";
    if (skipped(what, site)) return;
    meet_in_warp(what, site, [](Warp& warp) { ++warp.epoch; });
}

uint64_t shuffle(uint64_t bits, unsigned source, Site site) {
    static const char what[] = "shuffle";
    Warp& warp = *current->warp;
    const unsigned lane = current->lane;
    if (!(warp.members >> source & 1))
        fault(site, format("shuffle from lane %u of a warp of %d", source, __builtin_popcount(warp.members)));
    warp.values[lane] = bits;
    warp.sources[lane] = source;
    // Results apart from values: a fast lane may bring its next value before a slow one takes this result
    meet_in_warp(what, site, [](Warp& w) {
        for (unsigned k = 0; k < 32; ++k)
            if (w.members >> k & 1) w.results[k] = w.values[w.sources[k]];
    });
    return warp.results[lane];
}

void sync_block(Site site) {
    static const char what[] = "sync_block";
    if (skipped(what, site)) return;
    meet_in_block(what, site, [](Block& block) { release(block); });
}

bool any_in_block(bool value, Site site) {
    static const char what[] = "any_in_block";
    Block& block = *current->block;
    block.any |= value;
    meet_in_block(what, site, [](Block& b) {
        b.result = b.any;
        b.any = false;
        release(b);
    });
    return block.result;
}

void sync_cluster(Site site) {
    static const char what[] = "sync_cluster";
    if (skipped(what, site)) return;
    meet_in_block(what, site, [site](Block& block) {
        Cluster& cluster = *block.cluster;
        if (cluster.exited) fault(site, format("sync_cluster, but %u blocks of the cluster have exited", cluster.exited));
        if (++cluster.arrived == grid.cluster) release(cluster);
    });
}

void sync_blocks(const void* origin, uint32_t* word, unsigned parties, bool leads, Site site) {
    static const char what[] = "sync_blocks";
    if (skipped(what, site)) return;
    Block& mine = *current->block;
    if (!grid.cooperative) fault(site, "sync_blocks in a launch that is not cooperative");
    if (parties == 0 || parties > grid.blocks) fault(site, format("sync_blocks of %u of %u blocks", parties, grid.blocks));
    checked_tensor(origin, word, 4, 4, 4, Touch::write, site);
    if (mine.arrived && (mine.word != word || mine.parties != parties || mine.leads != leads))
        fault(site, "sync_blocks with another word, number of parties or leader than the block's other threads");
    mine.word = word;
    mine.parties = parties;
    mine.leads = leads;
    meet_in_block(what, site, [=](Block& block) {
        Meeting& meeting = machine.meetings[word];
        if (meeting.blocks.empty()) {
            if (*word & ~arrival_sense) fault(site, format("sync_blocks on a word that is not at rest: 0x%x", *word));
            meeting.parties = parties;
            meeting.leaders = 0;
        }
        if (meeting.parties != parties) fault(site, format("sync_blocks of %u and of %u blocks on one word", meeting.parties, parties));
        if (leads && meeting.leaders++) fault(site, "sync_blocks with two leaders");
        machine.words.push_back(word);
        *word += leads ? arrival_sense - (parties - 1) : 1;
        meeting.blocks.push_back(&block);
        if (meeting.blocks.size() < parties) return;
        if (meeting.leaders == 0) fault(site, "sync_blocks without a leader");
        std::vector<Block*> met;
        met.swap(meeting.blocks);
        Clock together;
        for (Block* b : met) {
            release(*b);
            if (!machine.races) continue;
            merge(together, b->acquired);
            together[b->index] = b->epoch;
        }
        if (machine.races)
            for (Block* b : met) merge(b->acquired, together);
    });
}

bool last_to_arrive(const void* origin, uint32_t* word, unsigned parties, Site site) {
    static const char what[] = "last_to_arrive";
    Block& block = *current->block;
    checked_tensor(origin, word, 4, 4, 4, Touch::write, site);
    if (block.arrived && (block.word != word || block.parties != parties))
        fault(site, "last_to_arrive with another word or number of parties than the block's other threads");
    block.word = word;
    block.parties = parties;
    meet_in_block(what, site, [=](Block& b) {
        const uint32_t before = *word & ~arrival_sense;
        if (before >= parties)
            fault(site, format("last_to_arrive of %u parties on a word that is not at rest or had more: 0x%x", parties, *word));
        b.result = before == parties - 1;
        machine.words.push_back(word);
        *word = (*word & arrival_sense) | (b.result ? 0 : before + 1);
        release(b);
        if (!machine.races) return;
        Clock& clock = machine.released[word];
        merge(clock, b.acquired);
        clock[b.index] = b.epoch;
        if (b.result) {
            merge(b.acquired, clock);
            machine.released.erase(word);
        }
    });
    return block.result;
}

// -------------------------------------------------------------------------------------------------------------------------- copies

namespace {

Asynchronous& asynchronous() {
    if (!current->asynchronous) current->asynchronous = &current->block->asynchronous[current->index];
    return *current->asynchronous;
}

constexpr int poison = 0xff;  // a NaN of every type

// A copy into shared memory lands when it is awaited; until then there is poison
Copy start_copy(const View& to, const void* origin, const void* from, Site site) {
    const unsigned bytes = unsigned(to.n) * to.size;
    char* target = static_cast<char*>(to.at) + int64_t(to.first) * to.size;
    if (to.first < 0 || to.n < 0 || to.first > to.count - to.n)
        fault(site, format("copy of %d elements to %d, beyond the %d of a shared view", to.n, to.first, to.count));
    Tensor& tensor = checked_tensor(origin, from, bytes, 16, to.size, Touch::read, site);
    Block& owner = owner_of(target, site);
    if (&owner != current->block) fault(site, "copy into another block's shared memory");
    if ((target - owner.shared) % 16) fault(site, format("copy to byte %d of shared memory, misaligned", int(target - owner.shared)));
    watch_tensor(tensor, from, bytes, to.size, false, site);
    watch_shared(owner, target, bytes, to.size, true, true, site);
    std::memset(target, poison, bytes);
    return {target, static_cast<const char*>(from), bytes, 0, &tensor, site};
}

Bulk& bulk_at(void* barrier, Site site) {
    for (Bulk& bulk : current->block->bulks)
        if (bulk.at == barrier) {
            watch_shared(*current->block, barrier, 8, 8, false, false, site);
            return bulk;
        }
    fault(site, "a bulk barrier that is not initialised");
}

void wake(Bulk& bulk) {
    for (Thread* thread : bulk.waiting) make_ready(*thread->warp, 1u << thread->lane);
    bulk.waiting.clear();
}

}  // namespace

void copy_async(const View& to, const void* origin, const void* from, Site site) {
    Copy copy = start_copy(to, origin, from, site);
    if (machine.traffic) count_access(copy.tensor, false, from, copy.bytes, site);
    Asynchronous& mine = asynchronous();
    for (const Copy& other : mine.in)
        if (copy.to < other.to + other.bytes && other.to < copy.to + copy.bytes)
            fault(site, format("copy to byte %d of shared memory, into which the copy at %s is not awaited",
                               int(copy.to - current->block->shared), at(other.site).c_str()));
    copy.group = mine.in_groups;
    mine.in.push_back(copy);
}

void copy_async_commit() { ++asynchronous().in_groups; }

void copy_async_wait(unsigned pending, Site site) {
    if (skipped("copy_async_wait", site)) return;
    Asynchronous& mine = asynchronous();
    auto landed = [&](const Copy& copy) { return copy.group + pending < mine.in_groups; };
    for (const Copy& copy : mine.in) {
        if (!landed(copy)) continue;
        watch_shared(*current->block, copy.to, copy.bytes, 16, true, false, copy.site);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    mine.in.erase(std::remove_if(mine.in.begin(), mine.in.end(), landed), mine.in.end());
}

void bulk_init(void* barrier, unsigned arrivals, Site site) {
    auto& bulks = current->block->bulks;
    for (const Bulk& bulk : bulks)
        if (bulk.at == barrier) fault(site, "a bulk barrier that is initialised already");
    if (arrivals == 0) fault(site, "a bulk barrier of no arrivals");
    watch_shared(*current->block, barrier, 8, 8, true, false, site);
    bulks.push_back({barrier, arrivals, static_cast<int>(arrivals), 0, 0, {}, {}});
}

void bulk_expect(void* barrier, unsigned bytes, Site site) {
    Bulk& bulk = bulk_at(barrier, site);
    if (bulk.pending == 0) fault(site, "more arrivals at a bulk barrier than it was initialised for, in one phase");
    --bulk.pending;
    bulk.expected += bytes;
    wake(bulk);
}

void copy_bulk(const View& to, const void* origin, const void* from, void* barrier, Site site) {
    if (int64_t(to.n) * to.size % 16) fault(site, format("bulk copy of %lld bytes, no multiple of 16", (long long)to.n * to.size));
    Bulk& bulk = bulk_at(barrier, site);
    Copy copy = start_copy(to, origin, from, site);
    if (machine.traffic && copy.bytes) count_range(*copy.tensor, false, from, copy.bytes);
    bulk.copies.push_back(copy);
    wake(bulk);
}

void bulk_wait(void* barrier, unsigned phase, Site site) {
    static const char what[] = "wait for a bulk barrier";
    if (skipped(what, site)) return;
    for (;;) {
        Bulk& bulk = bulk_at(barrier, site);
        if ((bulk.phase & 1) != (phase & 1)) return;
        if (bulk.pending == 0) {
            for (const Copy& copy : bulk.copies) {
                std::memcpy(copy.to, copy.from, copy.bytes);
                bulk.expected -= copy.bytes;
                Shadow& shadow = current->block->shadow;
                for (unsigned k = 0; machine.races && k < copy.bytes; k += shadow.granule) {
                    Cell& cell = shadow.cells[(copy.to - current->shared + k) / shadow.granule];
                    cell = Cell();
                    cell.writer = initialised;
                }
            }
            bulk.copies.clear();
            if (bulk.expected < 0) fault(site, format("bulk copies of %lld bytes more than expected", -(long long)bulk.expected));
            if (bulk.expected == 0) {
                ++bulk.phase;
                bulk.pending = static_cast<int>(bulk.arrivals);
                return;  // whoever else waits was woken by the last arrival or copy
            }
        }
        bulk.waiting.push_back(current);
        make_unready(*current->warp, 1u << current->lane);
        wait(what, site);
    }
}

void copy_bulk_out(const View& from, const void* origin, void* to, Site site) {
    const unsigned bytes = unsigned(from.n) * from.size;
    char* source = static_cast<char*>(from.at) + int64_t(from.first) * from.size;
    if (from.first < 0 || from.n < 0 || from.first > from.count - from.n)
        fault(site, format("copy of %d elements from %d, beyond the %d of a shared view", from.n, from.first, from.count));
    if (bytes % 16) fault(site, format("bulk copy of %u bytes, no multiple of 16", bytes));
    Tensor& tensor = checked_tensor(origin, to, bytes, 16, from.size, Touch::write, site);
    Block& owner = owner_of(source, site);
    if ((source - owner.shared) % 16) fault(site, format("copy from byte %d of shared memory, misaligned", int(source - owner.shared)));
    watch_shared(owner, source, bytes, from.size, false, false, site);
    watch_tensor(tensor, to, bytes, from.size, true, site);
    if (machine.traffic && bytes) count_range(tensor, true, to, bytes);
    Asynchronous& mine = asynchronous();
    mine.out.push_back({static_cast<char*>(to), source, bytes, mine.out_groups, &tensor, site});
}

void copy_bulk_commit() { ++asynchronous().out_groups; }

void copy_bulk_wait(unsigned pending, Site site) {
    if (skipped("copy_bulk_wait", site)) return;
    Asynchronous& mine = asynchronous();
    auto landed = [&](const Copy& copy) { return copy.group + pending < mine.out_groups; };
    for (const Copy& copy : mine.out)
        if (landed(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
    mine.out.erase(std::remove_if(mine.out.begin(), mine.out.end(), landed), mine.out.end());
}

// ------------------------------------------------------------------------------------------------------------------------ launches

namespace {

// A thread is through with the kernel
void leave() {
    Warp& warp = *current->warp;
    Block& block = *current->block;
    Cluster& cluster = *block.cluster;
    if (warp.arrived) fault(warp.site, format("exits with %s of the warp waiting in %s", lanes_text(warp.arrived).c_str(), warp.what));
    if (block.arrived) fault(block.site, format("exits while %u threads of the block wait in %s", block.arrived, block.what));
    if (current->asynchronous) {
        for (const Copy& copy : current->asynchronous->in) fault(copy.site, "exits before this copy was awaited");
        for (const Copy& copy : current->asynchronous->out) fault(copy.site, "exits before this copy was awaited");
    }
    if (block.read_by_others)
        fault(block.read_at,
              format("block %u exits though no barrier of the cluster follows this access to its shared memory", block.index));
    make_unready(warp, 1u << current->lane);
    warp.exited |= 1u << current->lane;
    if (warp.exited == warp.members && machine.traffic) flush(warp);
    if (++block.exited < grid.threads) return;
    for (const Bulk& bulk : block.bulks)
        for (const Copy& copy : bulk.copies) fault(copy.site, "the block exits before this copy was awaited");
    if (cluster.arrived)
        for (Block& waiting : cluster.blocks)
            if (waiting.arrived) fault(waiting.site, format("block %u exits while others wait in %s", block.index, waiting.what));
    ++machine.exited;
    if (++cluster.exited == grid.cluster) ++machine.finished;
}

void fiber() {
    machine.call(machine.kernel_and_arguments);
    leave();
    Thread* self = current;
    // A finished cluster makes place for the next at once, or blocks would come in waves
    current = machine.finished ? nullptr : next_thread();
    switch_context(&self->context, current ? current->context : main_context);
    std::abort();
}

// Blocks first, first + 1, ... as the cluster of a slot
void enter(Cluster& cluster, unsigned first) {
    const unsigned warps = (grid.threads + 31) / 32;
    const size_t shared_stride = (grid.shared_bytes + 127) / 128 * 128;
    if (cluster.shared_bytes < shared_stride * grid.cluster + 128) {
        cluster.shared_bytes = shared_stride * grid.cluster + 128;
        cluster.shared.reset(static_cast<char*>(std::aligned_alloc(128, cluster.shared_bytes)));
    }
    cluster.arrived = cluster.exited = 0;
    cluster.epoch = 0;
    cluster.blocks.resize(grid.cluster);
    unsigned* ranks = &machine.ranks[cluster.slot * grid.cluster * warps];
    if (machine.order == nf_order_starve) std::shuffle(ranks, ranks + grid.cluster * warps, machine.random);
    for (unsigned b = 0; b < grid.cluster; ++b) {
        Block& block = cluster.blocks[b];
        block.index = first + b;
        block.arrived = block.exited = 0;
        block.any = block.read_by_others = false;
        block.epoch = 0;
        block.cluster = &cluster;
        block.shared = cluster.shared.get() + b * shared_stride;
        std::memset(block.shared, poison, shared_stride);
        block.shadow = Shadow();
        block.bulks.clear();
        block.asynchronous.clear();
        block.acquired.clear();
        block.warps.resize(warps);
        block.threads.resize(grid.threads);
        for (unsigned t = 0; t < grid.threads; ++t) {
            Thread& thread = block.threads[t];
            thread = Thread();
            thread.index = t;
            thread.block_index = block.index;
            thread.lane = t % 32;
            thread.warp = &block.warps[t / 32];
            thread.block = &block;
            thread.shared = block.shared;
            thread.context = prepare((cluster.slot * grid.cluster + b) * grid.threads + t);
        }
        for (unsigned w = 0; w < warps; ++w) {
            Warp& warp = block.warps[w];
            const unsigned members = std::min(32u, grid.threads - w * 32);
            warp.members = members == 32 ? ~0u : (1u << members) - 1;
            warp.ready = warp.arrived = warp.in_block = warp.exited = 0;
            warp.epoch = 0;
            warp.threads = &block.threads[w * 32];
            warp.visits.clear();
            warp.turn = machine.order == nf_order_starve ? machine.random() % 32 : 0;
            warp.rank = ranks[b * warps + w];
            machine.by_rank[warp.rank] = &warp;
            make_ready(warp, warp.members);
        }
    }
}

// Who waits where: a sentence per place
std::string deadlock() {
    std::map<std::string, std::pair<unsigned, std::string>> places;
    for (auto& cluster : machine.resident)
        for (Block& block : cluster->blocks)
            for (Thread& thread : block.threads) {
                if (thread.warp->exited >> thread.lane & 1) continue;
                auto& entry = places[std::string(thread.waits_in) + " at " + at(thread.waits_at)];
                if (entry.first++ == 0) entry.second = format("block %u, thread %u first", block.index, thread.index);
            }
    std::string text = "deadlock:";
    for (auto& entry : places)
        text += format(" %u threads wait in %s (%s);", entry.second.first, entry.first.c_str(), entry.second.second.c_str());
    if (machine.exited) text += format(" %u blocks have exited;", machine.exited);
    for (auto& cluster : machine.resident)
        for (Block& block : cluster->blocks)
            for (Bulk& bulk : block.bulks)
                if (!bulk.waiting.empty())
                    text += format(" a bulk barrier of block %u lacks %d arrivals and %lld bytes;", block.index, bulk.pending,
                                   static_cast<long long>(bulk.expected));
    text.back() = ' ';
    return text + format("(kernel %s)", grid.name);
}

std::string json_of(const Asked& asked) {
    std::string text = "{";
    const char* names[2] = {"read", "write"};
    for (int k = 0; k < 2; ++k) {
        const Counts& c = asked.counts[k];
        text += format("%s\"%s_requests\": %lld, \"%s_bytes\": %lld, \"%s_sectors\": %lld, \"%s_distinct\": %lld", k ? ", " : "", names[k],
                       c.requests, names[k], c.bytes, names[k], c.sectors, names[k], c.distinct);
    }
    return text + "}";
}
std::string json_of(const Memory& memory) {
    return format("{\"requests\": %lld, \"wavefronts\": %lld, \"least_wavefronts\": %lld}", memory.requests, memory.wavefronts,
                  memory.least);
}

// Adds a launch's counts to those since reset; sectors distinct in all launches together as long as the tensor stays where it is
void add_up() {
    std::string of_tensors;
    for (auto& tensor : tensors) {
        Asked& asked = tensor->asked;
        if (asked.counts[0].requests + asked.counts[1].requests == 0) continue;
        of_tensors += (of_tensors.empty() ? "\"" : ", \"") + tensor->name + "\": " + json_of(asked);
        Asked& total = machine.totals[tensor->name];
        uintptr_t& base = machine.bases[tensor->name];
        for (int k = 0; k < 2; ++k) {
            Counts& sum = total.counts[k];
            if (base != tensor->begin) total.seen[k].clear();
            total.seen[k].resize(std::max(total.seen[k].size(), asked.seen[k].size()));
            sum.requests += asked.counts[k].requests;
            sum.bytes += asked.counts[k].bytes;
            sum.sectors += asked.counts[k].sectors;
            for (size_t w = 0; w < asked.seen[k].size(); ++w) {
                sum.distinct += __builtin_popcountll(asked.seen[k][w] & ~total.seen[k][w]);
                total.seen[k][w] |= asked.seen[k][w];
            }
        }
        base = tensor->begin;
    }
    machine.shared_total.requests += machine.shared.requests;
    machine.shared_total.wavefronts += machine.shared.wavefronts;
    machine.shared_total.least += machine.shared.least;
    machine.kernels += format(
        "%s{\"kernel\": \"%s\", \"blocks\": %u, \"threads\": %u, \"shared_bytes\": %u, \"cluster\": %u, "
        "\"cooperative\": %s, \"tensors\": {",
        machine.kernels.empty() ? "" : ", ", grid.name, grid.blocks, grid.threads, grid.shared_bytes, grid.cluster,
        grid.cooperative ? "true" : "false");
    machine.kernels += of_tensors + "}, \"shared\": " + json_of(machine.shared) + "}";
}

// Blocks that a device holds at a time
int64_t capacity() {
    const int64_t by_threads = 2048 / ((grid.threads + 31) / 32 * 32);
    const int64_t by_shared = machine.shared_of_processor / (grid.shared_bytes + 1024);  // the system takes 1 KB a block
    return machine.processors * std::min<int64_t>({by_threads, by_shared, 32});
}

void run_blocks() {
    const unsigned clusters = grid.blocks / grid.cluster;
    const unsigned at_a_time = grid.cooperative ? clusters : std::min(clusters, machine.order == nf_order_starve ? 4u : 1u);
    const size_t warps = size_t(at_a_time) * grid.cluster * ((grid.threads + 31) / 32);
    std::vector<unsigned> order(clusters);
    std::iota(order.begin(), order.end(), 0u);
    machine.ranks.resize(warps);
    std::iota(machine.ranks.begin(), machine.ranks.end(), 0u);
    if (machine.order == nf_order_reverse) {
        std::reverse(order.begin(), order.end());
        for (auto slot = machine.ranks.begin(); slot != machine.ranks.end(); slot += warps / at_a_time)
            std::reverse(slot, slot + warps / at_a_time);
    } else if (machine.order == nf_order_starve) {
        std::shuffle(order.begin(), order.end(), machine.random);
        std::shuffle(machine.ranks.begin(), machine.ranks.end(), machine.random);
    }
    machine.by_rank.assign(warps, nullptr);
    machine.ready.assign((warps + 63) / 64, 0);
    provide_stacks(size_t(at_a_time) * grid.cluster * grid.threads);
    while (machine.resident.size() < at_a_time) machine.resident.push_back(std::make_unique<Cluster>());
    machine.resident.resize(at_a_time);
    unsigned entered = 0;
    for (auto& cluster : machine.resident) {
        cluster->slot = entered;
        enter(*cluster, order[entered++] * grid.cluster);
    }
    for (unsigned done = 0; done < clusters;) {
        machine.any_rank = true;
        current = nullptr;
        current = next_thread();
        if (!current) return note(deadlock());
        switch_context(&main_context, current->context);
        if (machine.fault) return;
        for (auto& cluster : machine.resident) {
            if (!machine.finished) break;
            if (cluster->exited < grid.cluster) continue;
            --machine.finished;
            ++done;
            cluster->exited = 0;
            if (entered < clusters) enter(*cluster, order[entered++] * grid.cluster);
        }
    }
}

}  // namespace

int launch(const LaunchConfig& config, bool impossible, void (*call)(const void*), const void* kernel_and_arguments) {
    if (!machine.launching) return 0;
    std::lock_guard<std::mutex> lock(machine.mutex);
    grid = {config.name ? config.name : "?", config.blocks, config.threads, config.shared_bytes, config.cluster, config.cooperative};
    machine.fault = false;
    auto refuse = [&](const char* why, int error) {
        note(format("launch of %u blocks of %u threads, clusters of %u, %u bytes of shared memory: %s (kernel %s)", grid.blocks,
                    grid.threads, grid.cluster, grid.shared_bytes, why, grid.name));
        return error;
    };
    constexpr int invalid_value = 1, invalid_configuration = 9, cooperative_launch_too_large = 720,
                  invalid_cluster_size = 912;  // cudaError_t
    if (impossible) return refuse("no device takes it", invalid_configuration);
    if (int64_t(grid.shared_bytes) > machine.shared_limit) return refuse("more shared memory than a block can have", invalid_value);
    if (grid.cooperative && grid.blocks > capacity()) return refuse("too large to be cooperative", cooperative_launch_too_large);
    if (grid.cluster > unsigned(machine.largest_cluster)) return refuse("no room for such a cluster", invalid_cluster_size);
    watching = machine.races || machine.traffic;
    machine.call = call;
    machine.kernel_and_arguments = kernel_and_arguments;
    machine.exited = machine.finished = 0;
    machine.meetings.clear();
    machine.words.clear();
    machine.random.seed(machine.seed + static_cast<unsigned>(machine.launches));
    machine.segments.assign(2, Segment{});
    machine.released.clear();
    machine.shared = Memory();
    sites.clear();
    std::memset(static_cast<void*>(recent_numbers), 0, sizeof recent_numbers);
    std::memset(recent_tensors, 0, sizeof recent_tensors);
    ++machine.launches;
    run_blocks();
    current = nullptr;
    if (machine.traffic && !machine.fault) add_up();
    for (auto& tensor : tensors) {
        tensor->shadow.granule = 0;
        tensor->asked = Asked();
    }
    if (!machine.fault) return 0;
    for (uint32_t* word : machine.words) *word &= arrival_sense;  // or the next launch would be blamed
    return failed;
}

const char* message() { return machine.text.c_str(); }

void declare(const char* name, const void* pointer, int64_t bytes, bool writable) {
    if (!machine.launching) return;
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), [&](auto& tensor) { return tensor->name == name; }), tensors.end());
    if (!pointer || bytes <= 0) return;
    auto added = std::make_unique<Tensor>();
    added->name = name;
    added->begin = reinterpret_cast<uintptr_t>(pointer);
    added->bytes = bytes;
    added->writable = writable;
    tensors.push_back(std::move(added));
    for (auto& a : tensors) {
        a->overlaps_writable = false;
        a->memory = nullptr;
        for (auto& b : tensors) {
            const uintptr_t end = a->begin + a->bytes, other_end = b->begin + b->bytes;
            a->overlaps_writable |= b->writable && a->begin < other_end && b->begin < end;
            const bool contains = b->begin <= a->begin && other_end >= end;
            if (contains && (!a->memory || b->bytes > a->memory->bytes)) a->memory = b.get();
        }
    }
}
void forget_all() { tensors.clear(); }

}  // namespace simt
}  // namespace normfused

using namespace normfused::simt;

extern "C" {

void nf_emulation_order(int order, unsigned seed) {
    machine.order = order;
    machine.seed = seed;
}
void nf_emulation_races(int on) { machine.races = on != 0; }
void nf_emulation_traffic(int on) { machine.traffic = on != 0; }
void nf_emulation_launches(int on) { machine.launching = on != 0; }
void nf_emulation_limits(int processors, int shared_bytes, int shared_bytes_of_processor) {
    machine.processors = processors;
    machine.shared_limit = shared_bytes;
    machine.shared_of_processor = shared_bytes_of_processor;
}
void nf_emulation_largest_cluster(int blocks) { machine.largest_cluster = blocks; }
void nf_emulation_reset() {
    machine.text.clear();
    machine.launches = 0;
    machine.totals.clear();
    machine.bases.clear();
    machine.shared_total = Memory();
    machine.kernels.clear();
    forget_sites();
}
const char* nf_emulation_message() { return message(); }

int nf_emulation_counters(const char* tensor, long long out[8]) {
    std::fill(out, out + 8, 0LL);
    int known = 0;
    for (auto& entry : machine.totals) {
        if (*tensor && entry.first != tensor) continue;
        known = 1;
        for (int k = 0; k < 2; ++k) {
            const Counts& counts = entry.second.counts[k];
            const long long values[4] = {counts.requests, counts.bytes, counts.sectors, counts.distinct};
            for (int v = 0; v < 4; ++v) out[4 * k + v] += values[v];
        }
    }
    return known;
}

const char* nf_emulation_tensors() {
    std::string text = format("{\"launches\": %lld, \"tensors\": {", machine.launches);
    for (auto& entry : machine.totals) text += (text.back() == '{' ? "\"" : ", \"") + entry.first + "\": " + json_of(entry.second);
    machine.answer = text + "}, \"shared\": " + json_of(machine.shared_total) + ", \"kernels\": [" + machine.kernels + "]}";
    return machine.answer.c_str();
}

void nf_emulation_skip(const char* file_suffix, int line) {
    machine.skip_file = file_suffix ? file_suffix : "";
    machine.skip_line = line;
    forget_sites();
}

const char* nf_emulation_sites() {
    std::string text = "[";
    for (const Met& m : met)
        text +=
            format("%s{\"file\": \"%s\", \"line\": %d, \"what\": \"%s\"}", text.size() > 1 ? ", " : "", m.site.file, m.site.line, m.what);
    machine.answer = text + "]";
    return machine.answer.c_str();
}
}
