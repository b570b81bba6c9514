// What the operator library offers beside its operators, free of torch and Python: one exported symbol, so that the pybind11 module
// (and anything that can dlopen) reaches the library of any build, the emulated one included.
#pragma once

#include "../kernels/steps.h"

namespace normfused {

struct Interface {
    int version;                // of this struct
    const char* architectures;  // compiled, as TORCH_CUDA_ARCH_LIST writes them; "emulation"
    int (*runtime_version)();   // of the CUDA runtime in the library, 13000 for 13.0; 0: emulation
    int (*driver_version)();    // newest runtime that the driver serves; 0: no driver
    const char* (*error_string)(int status);
    int (*limits)(int device, Limits* limits);  // a status
    Requirements (*requirements)(const Problem&, Step, const Needs&, const Limits&, bool pool);
    int (*describe)(const Problem&, Step, const Needs&, const Limits&, bool pool, char* text, int size);
};
constexpr int interface_version = 2;

}  // namespace normfused

extern "C" __attribute__((visibility("default"))) const normfused::Interface* normfused_interface();
