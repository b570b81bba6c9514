// Arithmetic of indices.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace normfused {

template <class I, class = std::enable_if_t<std::is_integral<I>::value>> NF_HOST_DEVICE I min_(I a, I b) { return a < b ? a : b; }
template <class I, class = std::enable_if_t<std::is_integral<I>::value>> NF_HOST_DEVICE I max_(I a, I b) { return a < b ? b : a; }

// Of numbers that are not negative. A 64-bit division takes some 100 instructions; nearly always 32 bits are enough.
NF_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) { return (a | b) >> 31 ? a / b : int64_t(uint32_t(a) / uint32_t(b)); }
NF_HOST_DEVICE int64_t ceil_quotient(int64_t a, int64_t b) { return quotient(a + b - 1, b); }

}  // namespace normfused
