// Kernels that each do one thing wrong, and some that do unusual things right. The line to blame is marked HERE.
#include "../../csrc/kernels/device.cuh"

#include <cstdlib>
#include <cstring>

using namespace normfused;

namespace {

constexpr int elements = 128;  // of x and of y, which follows it in memory

struct Arguments {
    Global<const float> x;
    Global<float> y;
    Global<const float> y_read_only;
    Global<float> x_writable;
    Global<const float> undeclared, null;
    Global<uint32_t> word;
    Global<float> in_place;  // memory of two names: in, and out
};

bool first() { return block_index() == 0 && thread_index() == 0; }

// -------------------------------------------------------------------------------------------------------------------------- global

void load_beyond(Arguments a) {
    if (thread_index() == 5) a.y.store(0, a.x.load(elements));  // HERE load_beyond
}
void load_before(Arguments a) {
    if (first()) a.y.store(0, a.x.load(-1));  // HERE load_before
}
void load_beyond_after_advance(Arguments a) {
    if (first()) a.y.store(0, a.x.advance(elements).load(0));  // HERE load_beyond_after_advance
}
void pack_beyond(Arguments a) {
    if (first()) a.y.store<4>(0, a.x.advance(1).load<4>(elements - 4));  // HERE pack_beyond
}
void store_beyond(Arguments a) {
    if (first()) a.y.store(elements + 1000000, 1.0f);  // HERE store_beyond
}
void misaligned_load(Arguments a) {
    if (first()) a.y.store<4>(0, a.x.load<4>(2));  // HERE misaligned_load
}
void misaligned_store(Arguments a) {
    if (first()) a.y.store<2>(1, a.x.load<2>(0));  // HERE misaligned_store
}
void store_to_read_only(Arguments a) {
    if (first()) a.x_writable.store(3, 1.0f);  // HERE store_to_read_only
}
void read_only_load_of_written(Arguments a) {
    if (first()) a.y.store(0, a.y_read_only.load(7));  // HERE read_only_load_of_written
}
void undeclared_tensor(Arguments a) {
    if (first()) a.y.store(0, a.undeclared.load(0));  // HERE undeclared_tensor
}
void null_pointer(Arguments a) {
    if (first()) a.y.store(0, a.null.load(0));  // HERE null_pointer
}
void same_element_twice(Arguments a) {
    a.y.store(thread_index() / 2, 1.0f);  // HERE same_element_twice
}
void other_blocks_element(Arguments a) {
    a.y.store(block_index() * 32 + thread_index(), 1.0f);  // HERE other_blocks_element
    sync_block();
    a.y.store((block_index() + 1) % 2 * 32 + thread_index(), 2.0f);  // HERE other_blocks_element
}
void in_place_unordered(Arguments a) {
    const float next = a.in_place.load_coherent((thread_index() + 1) % 32);  // HERE in_place_unordered
    a.in_place.store(thread_index(), next);                                  // HERE in_place_unordered
}
void in_place_read_only(Arguments a) {
    const float mine = a.in_place.load(thread_index());  // HERE in_place_read_only
    a.in_place.store(thread_index(), mine + 1);
}

// -------------------------------------------------------------------------------------------------------------------------- shared

void shared_beyond(Arguments a) {
    auto s = shared_at<float>(0, 32);
    s.set(thread_index(), 1.0f);
    if (thread_index() == 9) a.y.store(0, s.get(32));  // HERE shared_beyond
}
void view_beyond(Arguments) {
    if (thread_index() == 0) shared_at<float>(256, 65).set(0, 1.0f);  // HERE view_beyond
}
void part_beyond(Arguments) {
    auto s = shared_at<float>(0, 32);
    if (thread_index() == 0) s.part(16, 17).set(0, 1.0f);  // HERE part_beyond
}
void misaligned_view(Arguments) {
    if (thread_index() == 0) shared_at<double>(4, 1).set(0, 1.0);  // HERE misaligned_view
}
void misaligned_shared_pack(Arguments) {
    auto s = shared_at<float>(0, 32);
    if (thread_index() == 0) s.store<4>(6, Pack<float, 4>{});  // HERE misaligned_shared_pack
}
void nobody_wrote(Arguments a) {
    auto s = shared_at<float>(0, 32);
    if (thread_index() < 31) s.set(thread_index(), 1.0f);
    sync_block();
    a.y.store(thread_index(), s.get(thread_index()));  // HERE nobody_wrote
}
void own_read_hides_anothers(Arguments a) {
    auto s = shared_at<float>(0, 32);
    if (thread_index() == 0) s.set(0, 1.0f);
    sync_block();
    if (thread_index() == 0) a.y.store(0, s.get(0));  // HERE own_read_hides_anothers
    if (thread_index() == 32) s.set(0, s.get(0) + 1);  // HERE own_read_hides_anothers
}
void no_sync_warp(Arguments a) {
    auto s = shared_at<float>(0, 32);
    s.set(thread_index(), 1.0f);
    a.y.store(thread_index(), s.get(thread_index() ^ 1));  // HERE no_sync_warp
}
void no_sync_block(Arguments a) {
    auto s = shared_at<float>(0, 64);
    s.set(thread_index(), 1.0f);
    sync_warp();
    a.y.store(thread_index(), s.get(63 - thread_index()));  // HERE no_sync_block
}
void no_sync_before_reuse(Arguments) {
    auto s = shared_at<float>(0, 64);
    s.set(thread_index(), 1.0f);
    sync_block();
    const float got = s.get(63 - thread_index());  // HERE no_sync_before_reuse
    s.set(thread_index(), got);                    // HERE no_sync_before_reuse
}

// ------------------------------------------------------------------------------------------------------------ barriers and shuffles

void divergent_barrier(Arguments) {
    if (thread_index() < 32) sync_block();  // HERE divergent_barrier
    else sync_block();  // HERE divergent_barrier
}
void barrier_missed(Arguments) {
    if (thread_index() < 63) sync_block();  // HERE barrier_missed
}
void one_barrier_more(Arguments) {
    for (unsigned k = 0; k < (thread_index() == 40 ? 2u : 1u); ++k) sync_block();  // HERE one_barrier_more
}
void divergent_shuffle(Arguments a) {
    float v = 1;
    if (thread_index() < 16) v = shuffle_xor(v, 1);  // HERE divergent_shuffle
    else v = shuffle_xor(v, 2);  // HERE divergent_shuffle
    a.y.store(thread_index(), v);
}
void lanes_masked_out(Arguments a) {
    float v = 1;
    if (thread_index() < 16) v = shuffle_xor(v, 1);  // HERE lanes_masked_out
    a.y.store(thread_index(), v);
    sync_block();  // HERE lanes_masked_out
}
void exit_before_shuffle(Arguments a) {
    if (thread_index() == 3) return;
    a.y.store(thread_index(), shuffle_xor(1.0f, 1));  // HERE exit_before_shuffle
}
void shuffle_beyond_warp(Arguments a) {
    a.y.store(thread_index(), shuffle(1.0f, 20));  // HERE shuffle_beyond_warp
}
void grid_barrier_in_plain_launch(Arguments a) {
    sync_grid(a.word);  // HERE grid_barrier_in_plain_launch
}
void grid_barrier_missed(Arguments a) {
    if (block_index() != 1) sync_grid(a.word);  // HERE grid_barrier_missed
}
void grid_barrier_not_at_rest(Arguments a) {
    sync_grid(a.word.advance(1));  // HERE grid_barrier_not_at_rest
}
void blocks_of_two_minds(Arguments a) {
    sync_blocks(a.word, block_index() == 0 ? 2 : 3, block_index() == 0);  // HERE blocks_of_two_minds
}
void two_leaders(Arguments a) {
    sync_blocks(a.word, 2, true);  // HERE two_leaders
}
void no_leader(Arguments a) {
    sync_blocks(a.word, 2, false);  // HERE no_leader
}
// Pairs of blocks meet, and read what another pair wrote
void blocks_unordered(Arguments a) {
    const unsigned pair = block_index() / 2;
    if (thread_index() == 0) a.y.store(block_index(), 1.0f);  // HERE blocks_unordered
    sync_blocks(a.word.advance(pair ? 2 : 0), 2, block_index() % 2 == 0);
    if (thread_index() == 0) a.y.load_coherent((block_index() + 2) % 4);  // HERE blocks_unordered
}
void more_arrivals_than_parties(Arguments a) {
    last_to_arrive(a.word.advance(1), 2);  // HERE more_arrivals_than_parties
}
void late_of_an_earlier_block(Arguments a) {
    // The blocks that did not come last must not rely on the others
    if (thread_index() == 0) a.y.store(block_index(), 1.0f);  // HERE late_of_an_earlier_block
    if (!last_to_arrive(a.word, grid_blocks()) && thread_index() == 0)
        a.y.store(32 + block_index(), a.y.load_coherent((block_index() + 1) % grid_blocks()));  // HERE late_of_an_earlier_block
}

// -------------------------------------------------------------------------------------------------------------------------- cluster

void remote_before_first_barrier(Arguments) {
    auto s = shared_at<float>(0, 32).on_block(cluster_rank() ^ 1);
    s.set(thread_index(), 1.0f);  // HERE remote_before_first_barrier
}
void remote_without_last_barrier(Arguments a) {
    auto s = shared_at<float>(0, 32);
    s.set(thread_index(), 1.0f);
    sync_cluster();
    if (cluster_rank() == 0)
        a.y.store(block_index() * 32 + thread_index(), s.on_block(1).get(thread_index()));  // HERE remote_without_last_barrier
}
void remote_unordered(Arguments) {
    auto s = shared_at<float>(0, 32);
    sync_cluster();
    s.on_block(0).set(thread_index(), float(cluster_rank()));  // HERE remote_unordered
    sync_cluster();
}
void rank_beyond(Arguments) {
    sync_cluster();
    shared_at<float>(0, 32).on_block(2);  // HERE rank_beyond
}
void cluster_barrier_missed(Arguments) {
    if (cluster_rank() == 0) sync_cluster();  // HERE cluster_barrier_missed
}

// --------------------------------------------------------------------------------------------------------------------------- copies

void copy_not_awaited(Arguments a) {
    auto s = shared_at<float>(0, 128);
    s.store(4 * thread_index(), Pack<float, 4>{});
    copy_async<4>(s, 4 * thread_index(), a.x, 4 * thread_index());
    copy_async_commit();
    a.y.store(thread_index(), s.get(4 * thread_index()));  // HERE copy_not_awaited
    copy_async_wait<0>();
}
void copy_not_committed(Arguments a) {
    auto s = shared_at<float>(0, 128);
    copy_async<4>(s, 4 * thread_index(), a.x, 4 * thread_index());  // HERE copy_not_committed
    copy_async_wait<0>();
    a.y.store(thread_index(), s.get(4 * thread_index()));  // HERE copy_not_committed
}
void copy_left_behind(Arguments a) {
    copy_async<4>(shared_at<float>(0, 128), 4 * thread_index(), a.x, 4 * thread_index());  // HERE copy_left_behind
    copy_async_commit();
}
void copy_over_a_copy(Arguments a) {
    auto s = shared_at<float>(0, 128);
    copy_async<4>(s, 4 * thread_index(), a.x, 4 * thread_index());
    copy_async_commit();
    copy_async<4>(s, 4 * thread_index(), a.x, 0);  // HERE copy_over_a_copy
    copy_async_commit();
    copy_async_wait<0>();
}
void misaligned_copy(Arguments a) {
    copy_async<4>(shared_at<float>(0, 128), 0, a.x, 2);  // HERE misaligned_copy
}
void bulk_not_awaited(Arguments a) {
    auto s = shared_at<float>(0, 64);
    auto barrier = bulk_barrier_at(256);
    if (thread_index() == 0) barrier.init(1);
    sync_block();
    if (thread_index() == 0) {
        barrier.expect_bytes(256);
        copy_bulk(s, 0, a.x, 0, 64, barrier);
    }
    sync_block();
    a.y.store(thread_index(), s.get(thread_index()));  // HERE bulk_not_awaited
    barrier.wait(0);
}
void bulk_too_few_bytes(Arguments a) {
    auto barrier = bulk_barrier_at(256);
    if (thread_index() == 0) {
        barrier.init(1);
        barrier.expect_bytes(128);
        copy_bulk(shared_at<float>(0, 64), 0, a.x, 0, 16, barrier);
        barrier.wait(0);  // HERE bulk_too_few_bytes
    }
}
void bulk_too_many_bytes(Arguments a) {
    auto barrier = bulk_barrier_at(256);
    if (thread_index() == 0) {
        barrier.init(1);
        barrier.expect_bytes(32);
        copy_bulk(shared_at<float>(0, 64), 0, a.x, 0, 16, barrier);
        barrier.wait(0);  // HERE bulk_too_many_bytes
    }
}
void bulk_not_initialised(Arguments) {
    if (thread_index() == 0) bulk_barrier_at(256).expect_bytes(32);  // HERE bulk_not_initialised
}
void bulk_init_without_barrier(Arguments a) {
    auto barrier = bulk_barrier_at(256);
    if (thread_index() == 0) {
        barrier.init(1);
        barrier.expect_bytes(64);
        copy_bulk(shared_at<float>(0, 64), 0, a.x, 0, 16, barrier);
    }
    barrier.wait(0);  // HERE bulk_init_without_barrier
}
void bulk_odd_size(Arguments a) {
    auto barrier = bulk_barrier_at(256);
    if (thread_index() == 0) {
        barrier.init(1);
        copy_bulk(shared_at<float>(0, 64), 0, a.x, 0, 3, barrier);  // HERE bulk_odd_size
    }
}
void bulk_out_left_behind(Arguments a) {
    auto s = shared_at<float>(0, 64);
    s.set(thread_index(), 1.0f);
    sync_block();
    if (thread_index() == 0) {
        copy_bulk(a.y, 0, s, 0, 32);  // HERE bulk_out_left_behind
        copy_bulk_commit();
    }
}

__attribute__((noinline)) void use_stack() {
    volatile char large[48 * 1024];
    for (int k = 0; k < int(sizeof large); k += 64) large[sizeof large - 1 - k] = 1;
}
void stack_overflow(Arguments) {
    if (thread_index() == 20) use_stack();
}
void nothing(Arguments) {}

// ------------------------------------------------------------------------------------------------------------------- unusual, right

void many_readers_one_writer(Arguments a) {
    auto s = shared_at<float>(0, 64);
    if (thread_index() == 0) s.set(0, 1.0f);
    sync_block();
    float sum = s.get(0);
    sync_block();
    if (thread_index() == 63) s.set(0, sum + 1);
    sync_block();
    sum += s.get(0);
    a.y.store(block_index() * 64 + thread_index(), any_in_block(sum == 3) ? sum : 0);
}
void in_place_ordered(Arguments a) {
    const float next = a.in_place.load_coherent((thread_index() + 1) % 32);
    sync_block();
    a.in_place.store(thread_index(), next);
    sync_block();
    a.y.store(thread_index(), a.in_place.load_coherent(31 - thread_index()));
}
void predicated_lanes(Arguments a) {
    auto s = shared_at<float>(0, 32);
    const unsigned lane = lane_index();
    if (lane < 20) s.set(lane, a.x.load(lane));
    sync_warp();
    float v = lane < 20 ? s.get(19 - lane) : 0;
    v += shuffle_down(v, 4);
    if (lane < 20) a.y.store(lane, v);
}
void alternating_grid_barriers(Arguments a) {
    for (int k = 0; k < 3; ++k) {
        a.y.store(block_index() * 32 + thread_index(), float(k));
        sync_grid(a.word);
        const float other = a.y.load_coherent((grid_blocks() - 1 - block_index()) * 32 + thread_index());
        if (other != float(k)) a.word.advance(1000).store(0, 0);  // a fault
        sync_grid(a.word);
    }
}
// Groups of three blocks, at a word each
void groups_of_blocks(Arguments a) {
    const unsigned group = block_index() / 3, rank = block_index() % 3;
    for (int k = 0; k < 3; ++k) {
        if (thread_index() == 0) a.y.store(k * 16 + block_index(), float(k + rank));
        sync_blocks(a.word.advance(group ? 2 : 0), 3, rank == unsigned(k));
        float sum = 0;
        for (unsigned other = 0; other < 3; ++other) sum += a.y.load_coherent(k * 16 + group * 3 + other);
        if (sum != float(3 * k + 3)) a.word.advance(1000).store(0, 0);  // a fault
    }
}
void arrivals_at_two_levels(Arguments a) {
    // Pairs of blocks, then the last of each pair
    if (thread_index() == 0) a.y.store(block_index(), 1.0f);
    if (!last_to_arrive(a.word.advance(2 + block_index() / 2), 2)) return;
    if (thread_index() == 0)
        a.y.store(16 + block_index() / 2, a.y.load_coherent(block_index() & ~1u) + a.y.load_coherent(block_index() | 1u));
    if (!last_to_arrive(a.word, grid_blocks() / 2)) return;
    float sum = 0;
    for (unsigned k = 0; k < grid_blocks() / 2; ++k) sum += a.y.load_coherent(16 + k);
    for (unsigned k = 0; k < grid_blocks(); ++k) sum += a.y.load_coherent(k);
    if (sum != 2 * float(grid_blocks())) a.word.advance(1000).store(0, 0);  // a fault
}
void votes(Arguments a) {
    for (unsigned k = 0; k < 64; ++k) {
        const bool some = any_in_block(thread_index() == k), none = any_in_block(false);
        if (!some || none) a.word.advance(1000).store(0, 0);  // a fault
    }
}
void partial_warp(Arguments a) {
    float v = float(thread_index());
    v = shuffle(v, 0);
    sync_warp();
    sync_block();
    a.y.store(thread_index(), v);
}

struct Case {
    const char* name;
    void (*kernel)(Arguments);
    uint32_t blocks, threads;
    bool cooperative = false;
    uint32_t cluster = 1, shared_bytes = 512;
};
#define NF_CASE(name, ...) {#name, name, __VA_ARGS__}
const Case cases[] = {
    NF_CASE(load_beyond, 2, 32), NF_CASE(load_before, 2, 32), NF_CASE(load_beyond_after_advance, 2, 32), NF_CASE(pack_beyond, 2, 32),
    NF_CASE(store_beyond, 2, 32), NF_CASE(misaligned_load, 2, 32), NF_CASE(misaligned_store, 2, 32), NF_CASE(store_to_read_only, 2, 32),
    NF_CASE(read_only_load_of_written, 2, 32), NF_CASE(undeclared_tensor, 2, 32), NF_CASE(null_pointer, 2, 32),
    NF_CASE(same_element_twice, 1, 32), NF_CASE(other_blocks_element, 2, 32), NF_CASE(in_place_unordered, 1, 32),
    NF_CASE(in_place_read_only, 1, 32), NF_CASE(in_place_ordered, 1, 32), NF_CASE(shared_beyond, 1, 32), NF_CASE(view_beyond, 1, 32),
    NF_CASE(part_beyond, 1, 32), NF_CASE(misaligned_view, 1, 32), NF_CASE(misaligned_shared_pack, 1, 32), NF_CASE(nobody_wrote, 1, 32),
    NF_CASE(own_read_hides_anothers, 1, 64), NF_CASE(no_sync_warp, 1, 32), NF_CASE(no_sync_block, 1, 64),
    NF_CASE(no_sync_before_reuse, 1, 64), NF_CASE(divergent_barrier, 1, 64), NF_CASE(barrier_missed, 1, 64),
    NF_CASE(one_barrier_more, 1, 64), NF_CASE(divergent_shuffle, 1, 32), NF_CASE(lanes_masked_out, 1, 32),
    NF_CASE(exit_before_shuffle, 1, 32), NF_CASE(shuffle_beyond_warp, 1, 16), NF_CASE(grid_barrier_in_plain_launch, 2, 32),
    NF_CASE(grid_barrier_missed, 3, 32, true), NF_CASE(grid_barrier_not_at_rest, 3, 32, true), NF_CASE(blocks_of_two_minds, 3, 32, true), NF_CASE(two_leaders, 2, 32, true),
    NF_CASE(no_leader, 2, 32, true), NF_CASE(blocks_unordered, 4, 32, true), NF_CASE(more_arrivals_than_parties, 3, 32),
    NF_CASE(late_of_an_earlier_block, 3, 32), NF_CASE(remote_before_first_barrier, 4, 32, false, 2),
    NF_CASE(remote_without_last_barrier, 4, 32, false, 2), NF_CASE(remote_unordered, 4, 32, false, 2),
    NF_CASE(rank_beyond, 4, 32, false, 2), NF_CASE(cluster_barrier_missed, 4, 32, false, 2), NF_CASE(copy_not_awaited, 1, 32),
    NF_CASE(copy_not_committed, 1, 32), NF_CASE(copy_left_behind, 1, 32), NF_CASE(copy_over_a_copy, 1, 32), NF_CASE(misaligned_copy, 1, 32),
    NF_CASE(bulk_not_awaited, 1, 32), NF_CASE(bulk_too_few_bytes, 1, 32), NF_CASE(bulk_too_many_bytes, 1, 32),
    NF_CASE(bulk_not_initialised, 1, 32), NF_CASE(bulk_init_without_barrier, 1, 64), NF_CASE(bulk_odd_size, 1, 32),
    NF_CASE(bulk_out_left_behind, 1, 64), NF_CASE(stack_overflow, 1, 32), {"no_threads", nothing, 1, 0},
    {"too_many_threads", nothing, 1, 1025}, {"odd_clusters", nothing, 3, 32, false, 2},
    {"too_much_shared", nothing, 1, 32, false, 1, 300000}, {"cooperative_too_large", nothing, 1000, 1024, true},
    NF_CASE(many_readers_one_writer, 2, 64), NF_CASE(predicated_lanes, 1, 32), NF_CASE(alternating_grid_barriers, 4, 32, true),
    NF_CASE(groups_of_blocks, 6, 64, true), NF_CASE(arrivals_at_two_levels, 8, 64), NF_CASE(votes, 2, 64), NF_CASE(partial_warp, 1, 50),
};

}  // namespace

alignas(128) static float memory[2 * elements];

// y of the last run
extern "C" const float* misuse_result() { return memory + elements; }

// The launch's status, or -100 for an unknown name
extern "C" int run_misuse(const char* name) {
    alignas(128) static float in_place[32], elsewhere[32];
    alignas(128) static uint32_t words[16];
    std::memset(memory, 0, sizeof memory);
    std::memset(words, 0, sizeof words);
    words[1] = 7;
    float* y = memory + elements;
    forget_all();
    declare("x", memory, elements * sizeof(float), false);
    declare("y", y, elements * sizeof(float), true);
    declare("in", in_place, sizeof in_place, false);
    declare("out", in_place, sizeof in_place, true);
    declare("words", words, sizeof words, true);
    for (const Case& c : cases)
        if (std::strcmp(c.name, name) == 0)
            return launch(c.kernel, {c.name, c.blocks, c.threads, c.shared_bytes, nullptr, c.cooperative, c.cluster},
                          Arguments{memory, y, y, memory, elsewhere, nullptr, words, in_place});
    return -100;
}
