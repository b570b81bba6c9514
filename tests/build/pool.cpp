// ArrivalPool over plain memory: who gets which words. Prints what failed; its exit status counts it.
#include "binding/pool.h"

#include <cstdio>
#include <deque>
#include <thread>
#include <vector>

using normfused::ArrivalPool;

namespace {
int failures = 0;

#define CHECK(condition) \
    if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition), ++failures

struct Memory {
    std::deque<std::vector<uint32_t>> blocks;
    bool empty = false;
    int asked = 0;
    ArrivalPool::Allocate allocate() {
        return [this](size_t words) -> uint32_t* {
            ++asked;
            if (empty) return nullptr;
            return blocks.emplace_back(words).data();
        };
    }
};

const ArrivalPool::Sizes small{64, 256, 512, 2048};
const void* const stream_a = &failures;
const void* const stream_b = &small;

void eager_launches_share_their_streams_slot() {
    Memory memory;
    ArrivalPool pool(memory.allocate(), small);
    uint32_t* a = pool.take(stream_a, 10, false);
    CHECK(a != nullptr);
    CHECK(pool.take(stream_a, 64, false) == a);
    CHECK(pool.take(nullptr, 10, false) != a);  // the legacy stream is one, too
    uint32_t* b = pool.take(stream_b, 64, false);
    CHECK(b >= a + 64 || b + 64 <= a);
    CHECK(memory.asked == 1);
}

void a_launch_that_needs_more_gets_another_slot() {
    Memory memory;
    ArrivalPool pool(memory.allocate(), small);
    uint32_t* a = pool.take(stream_a, 64, false);
    uint32_t* more = pool.take(stream_a, 65, false);
    CHECK(more >= a + 64 || more + 128 <= a);
    CHECK(pool.take(stream_a, 128, false) == more);  // at least doubled
    uint32_t* b = pool.take(stream_b, 64, false);
    CHECK(b >= a + 64 || b + 64 <= a);  // a's old slot may still be in use
}

void captured_launches_own_their_words() {
    Memory memory;
    ArrivalPool pool(memory.allocate(), small);
    uint32_t* eager = pool.take(stream_a, 64, false);
    std::vector<uint32_t*> taken{eager};
    for (int i = 0; i < 4; ++i) taken.push_back(pool.take(stream_a, 40, true));
    for (size_t i = 0; i < taken.size(); ++i) {
        CHECK(taken[i] != nullptr);
        for (size_t j = 0; j < i; ++j) CHECK(taken[i] >= taken[j] + 40 || taken[i] + 40 <= taken[j]);
    }
    CHECK(pool.take(stream_a, 64, false) == eager);
}

void it_grows_outside_capture_only() {
    Memory memory;
    ArrivalPool pool(memory.allocate(), small);
    CHECK(pool.take(stream_a, 32, true) == nullptr);  // nothing was reserved yet
    CHECK(memory.asked == 0);
    pool.take(stream_a, 32, false);
    const int asked = memory.asked;
    while (pool.take(stream_a, 64, true) != nullptr) continue;
    CHECK(memory.asked == asked);
    pool.take(stream_a, 32, false);  // refills the reserve, although its own slot is there
    CHECK(memory.asked == asked + 1);
    CHECK(pool.take(stream_a, 256, true) != nullptr);
}

void its_size_is_bounded() {
    Memory memory;
    ArrivalPool pool(memory.allocate(), small);
    for (int round = 0; round < 100; ++round) {
        pool.take(stream_a, 32, false);
        while (pool.take(stream_a, 64, true) != nullptr) continue;
    }
    CHECK(pool.allocated() == 2048);
    CHECK(pool.take(stream_a, 32, false) != nullptr);   // it has a slot
    CHECK(pool.take(stream_b, 32, false) == nullptr);   // it has none and gets none
    CHECK(pool.take(stream_a, 1 << 20, false) == nullptr);
}

void without_memory_there_are_no_words() {
    Memory memory;
    memory.empty = true;
    ArrivalPool pool(memory.allocate(), small);
    for (int i = 0; i < 5; ++i) CHECK(pool.take(stream_a, 32, false) == nullptr);
    CHECK(memory.asked == 1);
}

void threads_do_not_share_words() {
    Memory memory;
    ArrivalPool pool(memory.allocate());
    pool.take(stream_a, 32, false);
    std::vector<std::vector<uint32_t*>> taken(4);
    std::vector<std::thread> threads;
    for (auto& mine : taken)
        threads.emplace_back([&pool, &mine] {
            for (int i = 0; i < 500; ++i) mine.push_back(pool.take(&mine, 32, i % 2 == 0));
        });
    for (auto& thread : threads) thread.join();
    for (size_t t = 0; t < taken.size(); ++t)
        for (uint32_t* words : taken[t]) {
            CHECK(words != nullptr && words[0] == 0);
            if (words != nullptr && words != taken[t][1]) words[0] = 1;  // captured: nobody else may find it set
        }
}
}  // namespace

int main() {
    eager_launches_share_their_streams_slot();
    a_launch_that_needs_more_gets_another_slot();
    captured_launches_own_their_words();
    it_grows_outside_capture_only();
    its_size_is_bounded();
    without_memory_there_are_no_words();
    threads_do_not_share_words();
    return failures;
}
