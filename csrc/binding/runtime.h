// What the binding asks of the device beside the kernels; torch-free. runtime.cpp has one form for CUDA and one for the emulation.
#pragma once

#include "../kernels/steps.h"
#include "pool.h"

namespace normfused {

struct Device {
    explicit Device(ArrivalPool::Allocate allocate) : arrivals(std::move(allocate)) {}
    Limits limits;
    ArrivalPool arrivals;
};

// The device called `index`, asked for its limits once. Null with `status` set if it does not answer. Call with it current.
Device* device_at(int index, int& status);

// Arrival words for a launch on `stream` of the current device, or null.
uint32_t* take_arrivals(Device& device, void* stream, uint32_t words);

// Whether `index` is the current device of this thread: then torch's guard, which allocates, is not needed.
bool is_current(int index);

// The device's limits, with the processors that cooperative launches are to leave alone
Limits limits_now(const Device& device);
void spare_processors(int count);

const char* error_string(int status);

#ifdef NF_EMULATION
// The device to pretend, so that shapes and limits can be scaled down together; `pool` false: an exhausted one.
void pretend(const Limits& limits, bool pool);
#endif

}  // namespace normfused
