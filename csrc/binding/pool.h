// Arrival words: through them the blocks of one launch learn that the others have arrived. Kernels find them at rest and leave them so
// (all but the top bit zero: device.cuh).
//
// Eager launches of one stream run one after the other and share the stream's slot. A launch captured into a graph may be replayed
// beside anything, so it owns its words for good. Memory can only be had outside capture, hence a reserve is kept for captures to come.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace normfused {

class ArrivalPool {
   public:
    using Allocate = std::function<uint32_t*(size_t words)>;  // zeroed and never freed; null where there is none

    struct Sizes {  // in words
        size_t slot = 1024;        // least, of a stream
        size_t reserve = 1 << 18;  // kept for captures: a network's launches (1 MiB)
        size_t block = 1 << 19;    // of one allocation
        size_t most = 1 << 24;     // of the pool (64 MiB)
    };

    explicit ArrivalPool(Allocate allocate) : ArrivalPool(std::move(allocate), Sizes{}) {}
    ArrivalPool(Allocate allocate, Sizes sizes) : allocate_(std::move(allocate)), sizes_(sizes) {}

    // `words` zero words for a launch on `stream`, or null: the caller then launches without.
    uint32_t* take(const void* stream, size_t words, bool capturing) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (capturing) return carve(words);
        Slot& slot = slots_[stream];
        // The slot that became too small is not given to another stream: its last launch may still be running
        if (slot.words < words) {
            const size_t wanted = std::max({words, 2 * slot.words, sizes_.slot});
            if (largest_rest() < wanted) grow(wanted);
            uint32_t* data = carve(wanted);
            if (data == nullptr) return nullptr;
            slot = {data, wanted};
        }
        if (largest_rest() < sizes_.reserve) grow(sizes_.reserve);
        return slot.data;
    }

    size_t allocated() const { return allocated_; }

   private:
    struct Slot {
        uint32_t* data = nullptr;
        size_t words = 0;
    };
    static constexpr size_t line = 32;  // words of 128 bytes: launches do not share a cache line

    size_t largest_rest() const {
        size_t most = 0;
        for (const Slot& block : blocks_) most = std::max(most, block.words);
        return most;
    }

    uint32_t* carve(size_t words) {
        words = (words + line - 1) / line * line;
        for (Slot& block : blocks_) {
            if (block.words < words) continue;
            uint32_t* data = block.data;
            block = {data + words, block.words - words};
            return data;
        }
        return nullptr;
    }

    void grow(size_t least) {
        const size_t words = std::max(sizes_.block, (least + line - 1) / line * line);
        if (full_ || allocated_ + words > sizes_.most) return;
        uint32_t* data = allocate_(words);
        full_ = data == nullptr;  // asked once: an allocation that fails costs every call that tries it
        if (full_) return;
        allocated_ += words;
        blocks_.push_back({data, words});
    }

    Allocate allocate_;
    Sizes sizes_;
    std::mutex mutex_;
    std::unordered_map<const void*, Slot> slots_;
    std::vector<Slot> blocks_;  // what is left of each
    size_t allocated_ = 0;
    bool full_ = false;
};

}  // namespace normfused
