// Kernels that are right: without any of their barriers and waits they would not be. And kernels that ask for memory in known patterns.
#include "../../csrc/kernels/device.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

using namespace normfused;

namespace {

struct Arguments {
    Global<const float> x;
    Global<float> y, scratch;
    Global<uint32_t> words;
    int count;
};

constexpr int blocks = 4, threads = 64, per_block = 512;  // elements

// A barrier must come before the scratch is used again
NF_DEVICE float block_sum(float value, Shared<float> scratch) {
    for (unsigned mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
    if (lane_index() == 0) scratch.set(warp_index(), value);
    sync_block();
    value = 0;
    for (unsigned w = 0; w < block_threads() / 32; ++w) value += scratch.get(w);
    return value;
}

// y: x centred, divided by its root mean square, per block
NF_KERNEL(threads) normalize(NF_GRID_CONSTANT Arguments a) {
    auto scratch = shared_at<float>(0, threads / 32);
    const int64_t base = int64_t(block_index()) * per_block;
    float sum = 0;
    for (int i = 4 * thread_index(); i < per_block; i += 4 * threads) {
        auto v = a.x.load<4>(base + i);
        for (int k = 0; k < 4; ++k) sum += v[k];
    }
    const float mean = block_sum(sum, scratch) / per_block;
    sync_block();
    sum = 0;
    for (int i = 4 * thread_index(); i < per_block; i += 4 * threads) {
        auto v = a.x.load<4>(base + i);
        for (int k = 0; k < 4; ++k) sum += (v[k] - mean) * (v[k] - mean);
    }
    const float scale = 1 / sqrt_(block_sum(sum, scratch) / per_block);
    for (int i = 4 * thread_index(); i < per_block; i += 4 * threads) {
        auto v = a.x.load<4>(base + i);
        for (int k = 0; k < 4; ++k) v[k] = (v[k] - mean) * scale;
        a.y.store(base + i, v);
    }
}

// Reverses 32 elements per warp and then exchanges pairs, through memory shared by the warp only
NF_KERNEL(threads) warp_permutation(NF_GRID_CONSTANT Arguments a) {
    auto mine = shared_at<float>(0, threads).part(32 * warp_index(), 32);
    for (int i = thread_index(); i < per_block; i += threads) {
        const int64_t at = int64_t(block_index()) * per_block + i;
        mine.set(lane_index(), a.x.load(at));
        sync_warp();
        float v = mine.get(31 - lane_index());
        sync_warp();
        mine.set(lane_index(), v);
        sync_warp();
        v = mine.get(lane_index() ^ 1);
        sync_warp();
        a.y.store(at, v);
    }
}

// Sums of neighbours by a pipeline of two tiles; every thread reads what another has copied
NF_KERNEL(threads) pipeline(NF_GRID_CONSTANT Arguments a) {
    constexpr int tile = 4 * threads, tiles = per_block / tile;
    const int64_t base = int64_t(block_index()) * per_block;
    auto stage = shared_at<float>(0, 2 * tile);
    copy_async<4>(stage, 4 * thread_index(), a.x, base + 4 * thread_index());
    copy_async_commit();
    for (int t = 0; t < 2 * tiles; ++t) {  // every tile twice
        if (t + 1 < 2 * tiles)
            copy_async<4>(stage, (t + 1) % 2 * tile + 4 * thread_index(), a.x, base + (t + 1) % tiles * tile + 4 * thread_index());
        copy_async_commit();
        copy_async_wait<1>();
        sync_block();
        for (int k = thread_index(); k < tile; k += threads) {
            const float v = stage.get(t % 2 * tile + k) + stage.get(t % 2 * tile + (k ^ 5));
            a.y.store(base + t % tiles * tile + k, v);
        }
        sync_block();
    }
}

// Adds 1 in shared memory, copied in and out in bulk, a half at a time
NF_KERNEL(threads) bulk(NF_GRID_CONSTANT Arguments a) {
    constexpr int half = per_block / 2;
    const int64_t base = int64_t(block_index()) * per_block;
    auto stage = shared_at<float>(16, half);
    auto barrier = bulk_barrier_at(0);
    if (thread_index() == 0) barrier.init(1);
    sync_block();
    for (int t = 0; t < 2; ++t) {
        if (thread_index() == 0) {
            barrier.expect_bytes(half * sizeof(float));
            copy_bulk(stage, 0, a.x, base + t * half, half / 2, barrier);
            copy_bulk(stage, half / 2, a.x, base + t * half + half / 2, half / 2, barrier);
        }
        barrier.wait(t);
        for (int k = thread_index(); k < half; k += threads) stage.set(k, stage.get(k) + 1);
        fence_bulk();
        sync_block();
        if (thread_index() == 0) {
            copy_bulk(a.y, base + t * half, stage, 0, half);
            copy_bulk_commit();
            copy_bulk_wait<0>();
        }
    }
}

// y: x divided by the sum of all, and then by that of the quotients, which is 1
NF_KERNEL(threads) whole_grid(NF_GRID_CONSTANT Arguments a) {
    auto scratch = shared_at<float>(0, threads / 32);
    const int64_t base = int64_t(block_index()) * per_block;
    for (int pass = 0; pass < 2; ++pass) {
        float sum = 0;
        for (int i = thread_index(); i < per_block; i += threads) sum += pass ? a.y.load_coherent(base + i) : a.x.load(base + i);
        sum = block_sum(sum, scratch);
        if (thread_index() == 0) a.scratch.store(block_index(), sum);
        sync_grid(a.words);
        sum = 0;
        for (int b = 0; b < blocks; ++b) sum += a.scratch.load_coherent(b);
        for (int i = thread_index(); i < per_block; i += threads)
            a.y.store(base + i, (pass ? a.y.load_coherent(base + i) : a.x.load(base + i)) / sum);
        sync_grid(a.words);
    }
}

// y: x minus the mean of a cluster's blocks
NF_KERNEL(threads) cluster_mean(NF_GRID_CONSTANT Arguments a) {
    auto scratch = shared_at<float>(0, threads / 32);
    auto total = shared_at<float>(64, 1);
    const int64_t base = int64_t(block_index()) * per_block;
    float sum = 0;
    for (int i = thread_index(); i < per_block; i += threads) sum += a.x.load(base + i);
    sum = block_sum(sum, scratch);
    if (thread_index() == 0) total.set(0, sum);
    sync_cluster();
    sum = 0;
    for (unsigned r = 0; r < cluster_blocks(); ++r) sum += total.on_block(r).get(0);
    sync_cluster();
    for (int i = thread_index(); i < per_block; i += threads)
        a.y.store(base + i, a.x.load(base + i) - sum / (per_block * cluster_blocks()));
}

// y: sums over blocks of x, added by the last block
NF_KERNEL(threads) last_block(NF_GRID_CONSTANT Arguments a) {
    const int64_t base = int64_t(block_index()) * per_block;
    for (int i = thread_index(); i < per_block; i += threads) a.scratch.store(base + i, 2 * a.x.load(base + i));
    if (!last_to_arrive(a.words, grid_blocks())) return;
    for (int i = thread_index(); i < per_block; i += threads) {
        float sum = 0;
        for (int b = 0; b < blocks; ++b) sum += a.scratch.load_coherent(b * per_block + i);
        a.y.store(i, sum);
    }
}

void reference(const char* name, const float* x, double* y) {
    constexpr int n = blocks * per_block;
    auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    double all = 0;
    for (int i = 0; i < n; ++i) all += x[i];
    for (int i = 0; i < n; ++i) {
        const int first = i / per_block * per_block;
        double sum = 0, squares = 0;
        for (int k = first; k < first + per_block; ++k) sum += x[k];
        for (int k = first; k < first + per_block; ++k) squares += (x[k] - sum / per_block) * (x[k] - sum / per_block);
        const int pair = i / per_block / 2 * 2 * per_block;
        double two = 0;
        for (int k = pair; k < pair + 2 * per_block; ++k) two += x[k];
        double column = 0;
        for (int k = i; k < n; k += per_block) column += 2.0 * x[k];
        y[i] = is("normalize")          ? (x[i] - sum / per_block) / std::sqrt(squares / per_block)
               : is("warp_permutation") ? x[i / 32 * 32 + (31 - (i % 32 ^ 1))]
               : is("pipeline")         ? double(x[i]) + x[i ^ 5]
               : is("bulk")             ? x[i] + 1.0
               : is("whole_grid")       ? x[i] / all
               : is("cluster_mean")     ? x[i] - two / (2 * per_block)
               : i < per_block          ? column
                                        : 0;
    }
}

// ------------------------------------------------------------------------------------------------------------------------- patterns

NF_KERNEL(threads) copy_packs(NF_GRID_CONSTANT Arguments a) {
    for (int64_t i = 4 * int64_t(block_index() * threads + thread_index()); i < a.count; i += 4 * int64_t(grid_blocks() * threads)) {
        if (i + 4 <= a.count) {
            a.y.store(i, a.x.load<4>(i, Cache::evict_first));
        } else {
            for (int64_t k = i; k < a.count; ++k) a.y.store(k, a.x.load(k));
        }
    }
}
NF_KERNEL(threads) copy_scalars(NF_GRID_CONSTANT Arguments a) {
    for (int i = block_index() * threads + thread_index(); i < a.count; i += grid_blocks() * threads) a.y.store(i, a.x.load(i));
}
// Lanes 32 bytes apart: each request touches as many sectors as lanes, each sector is asked for eight times
NF_KERNEL(threads) copy_strided(NF_GRID_CONSTANT Arguments a) {
    const int64_t base = 8 * int64_t(block_index() * threads + thread_index());
    for (int k = 0; k < 8; ++k)
        if (base + k < a.count) a.y.store(base + k, a.x.load(base + k));
}
NF_KERNEL(threads) copy_by_async(NF_GRID_CONSTANT Arguments a) {
    auto stage = shared_at<float>(0, 4 * threads);
    const int64_t base = 4 * int64_t(block_index()) * threads;
    copy_async<4>(stage, 4 * thread_index(), a.x, base + 4 * thread_index());
    copy_async_commit();
    copy_async_wait<0>();
    a.y.store(base + 4 * thread_index(), stage.load<4>(4 * thread_index()));
}
NF_KERNEL(threads) copy_by_bulk(NF_GRID_CONSTANT Arguments a) {
    auto stage = shared_at<float>(16, 4 * threads);
    auto barrier = bulk_barrier_at(0);
    const int64_t base = 4 * int64_t(block_index()) * threads;
    if (thread_index() == 0) {
        barrier.init(1);
        barrier.expect_bytes(16 * threads);
        copy_bulk(stage, 0, a.x, base, 4 * threads, barrier);
        barrier.wait(0);
        copy_bulk(a.y, base, stage, 0, 4 * threads);
        copy_bulk_commit();
        copy_bulk_wait<0>();
    }
}
// A reduction between the accesses, after which lanes of a warp go on at different times
NF_KERNEL(threads) copy_with_barriers(NF_GRID_CONSTANT Arguments a) {
    for (int i = block_index() * threads; i < a.count; i += grid_blocks() * threads) {
        const int at = i + thread_index();
        float v = at < a.count ? a.x.load(at) : 0;
        shuffle_xor(v, 1);
        if (at < a.count) a.y.store(at, v);
        sync_block();
    }
}
// Rows that grow, between barriers of the warp or the block: lanes come late to the same line
template <bool whole_block>
NF_KERNEL(threads) copy_triangle(NF_GRID_CONSTANT Arguments a) {
    int begin = 0;
    for (int row = 1; begin < a.count; ++row) {
        const int at = begin + static_cast<int>(thread_index());
        if (static_cast<int>(thread_index()) < row && at < a.count) a.y.store(at, a.x.load(at));
        if (whole_block) sync_block();
        else sync_warp();
        begin += row < threads ? row : threads;
    }
}
// The lanes of a warp come to four sectors by turns
NF_KERNEL(threads) copy_by_turns(NF_GRID_CONSTANT Arguments a) {
    const int lane = lane_index(), place = lane % 4 * 8 + lane / 4;
    for (int i = 32 * (block_index() * threads / 32 + warp_index()); i < a.count; i += grid_blocks() * threads)
        a.y.store(i + place, a.x.load(i + place));
}
// Transposition of a tile: stores without conflicts, loads with 32, unless the rows are padded
template <int row>
NF_KERNEL(threads) transpose_shared(NF_GRID_CONSTANT Arguments a) {
    auto tile = shared_at<float>(0, 32 * row);
    if (thread_index() < 32)
        for (unsigned k = 0; k < 32; ++k) tile.set(k * row + thread_index(), float(k));
    sync_block();
    float sum = 0;
    if (thread_index() < 32)
        for (unsigned k = 0; k < 32; ++k) sum += tile.get(thread_index() * row + k);
    if (thread_index() < 32) a.y.store(thread_index(), sum);
}
NF_KERNEL(threads) shared_packs(NF_GRID_CONSTANT Arguments a) {
    auto tile = shared_at<float>(0, 4 * threads);
    tile.store(4 * thread_index(), Pack<float, 4>{});
    a.y.store<2>(2 * thread_index(), Pack<float, 2>{{tile.get(4 * thread_index()), 0}});
}

struct Sample {
    const char* name;
    void (*kernel)(Arguments);
    bool cooperative;
    uint32_t cluster;
};
const Sample samples[] = {
    {"normalize", normalize, false, 1}, {"warp_permutation", warp_permutation, false, 1}, {"pipeline", pipeline, false, 1},
    {"bulk", bulk, false, 1},           {"whole_grid", whole_grid, true, 1},              {"cluster_mean", cluster_mean, false, 2},
    {"last_block", last_block, false, 1},
};
const Sample patterns[] = {
    {"copy_packs", copy_packs, false, 1},
    {"copy_scalars", copy_scalars, false, 1},
    {"copy_strided", copy_strided, false, 1},
    {"copy_by_async", copy_by_async, false, 1},
    {"copy_by_bulk", copy_by_bulk, false, 1},
    {"copy_with_barriers", copy_with_barriers, false, 1},
    {"copy_triangle_by_block", copy_triangle<true>, false, 1},
    {"copy_triangle_by_warp", copy_triangle<false>, false, 1},
    {"copy_by_turns", copy_by_turns, false, 1},
    {"transpose_conflicts", transpose_shared<32>, false, 1},
    {"transpose_padded", transpose_shared<33>, false, 1},
    {"shared_packs", shared_packs, false, 1},
};

}  // namespace

// 0, the launch's status, 1 for a wrong result, or -100 for an unknown name
extern "C" int run_sample(const char* name) {
    constexpr int n = blocks * per_block;
    alignas(128) static float x[n], y[n], scratch[n];
    alignas(128) static uint32_t words[4];
    for (int i = 0; i < n; ++i) x[i] = 1 + float(i * 37 % 101) / 64;
    std::memset(y, std::strcmp(name, "last_block") ? 0xff : 0, sizeof y);
    std::memset(scratch, 0xff, sizeof scratch);
    std::memset(words, 0, sizeof words);
    forget_all();
    declare("x", x, sizeof x, false);
    declare("y", y, sizeof y, true);
    declare("scratch", scratch, sizeof scratch, true);
    declare("words", words, sizeof words, true);
    for (const Sample& s : samples) {
        if (std::strcmp(s.name, name) != 0) continue;
        const int status =
            launch(s.kernel, {s.name, blocks, threads, 4096, nullptr, s.cooperative, s.cluster}, Arguments{x, y, scratch, words, n});
        if (status) return status;
        std::vector<double> expected(n);
        reference(name, x, expected.data());
        for (int i = 0; i < n; ++i)
            if (!(std::fabs(y[i] - expected[i]) <= 1e-5 * (1e-3 + std::fabs(expected[i])) + 1e-6)) return 1;
        for (uint32_t word : words)
            if (word & ~arrival_sense) return 1;
        return 0;
    }
    return -100;
}

// Copies the first ``count`` of 4096 elements
extern "C" int run_pattern(const char* name, int count) {
    constexpr int n = 4096;
    alignas(128) static float x[n], y[n];
    forget_all();
    declare("x", x, count * sizeof(float), false);
    declare("y", y, count * sizeof(float), true);
    for (int i = 0; i < n; ++i) x[i] = float(i), y[i] = 0;
    for (const Sample& s : patterns) {
        if (std::strcmp(s.name, name) != 0) continue;
        const bool whole = !std::strcmp(name, "copy_by_async") || !std::strcmp(name, "copy_by_bulk") || !std::strcmp(name, "copy_strided");
        const bool one_block = std::strncmp(name, "copy_", 5) || !std::strncmp(name, "copy_t", 6);
        const uint32_t grid = whole ? (count + 4 * threads - 1) / (4 * threads) : one_block ? 1 : 3;
        const int status = launch(s.kernel, {s.name, grid, threads, 8192, nullptr}, Arguments{x, y, nullptr, nullptr, count});
        if (status || std::strncmp(name, "copy", 4)) return status;
        for (int i = 0; i < n; ++i)
            if (y[i] != (i < count ? x[i] : 0)) return 1;
        return 0;
    }
    return -100;
}

// Launches that write the same memory by other threads, one after another
extern "C" int run_twice() {
    constexpr int n = 1024;
    alignas(128) static float x[n], y[n];
    forget_all();
    declare("x", x, sizeof x, false);
    declare("y", y, sizeof y, true);
    const Arguments arguments{x, y, nullptr, nullptr, n};
    const int first = launch(copy_scalars, {"first", 2, threads, 0, nullptr}, arguments);
    return first ? first : launch(copy_packs, {"second", 3, threads, 0, nullptr}, arguments);
}

#ifdef NF_EMULATION
// Who ran when: each thread notes block * 1000 + thread, before and after a barrier
static std::vector<int> trace;
static void note_order(Arguments) {
    trace.push_back(static_cast<int>(block_index() * 1000 + thread_index()));
    sync_block();
    trace.push_back(static_cast<int>(block_index() * 1000 + thread_index()));
}
extern "C" int run_trace(int grid, int block, int cooperative, int* out) {
    trace.clear();
    const int status = launch(note_order, {"note_order", uint32_t(grid), uint32_t(block), 0, nullptr, cooperative != 0}, Arguments{});
    std::copy(trace.begin(), trace.end(), out);
    return status ? status : static_cast<int>(trace.size()) - 2 * grid * block;
}
#endif
