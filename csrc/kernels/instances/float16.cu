// The kernels for tensors of float16; one file per type, so that they compile in parallel.
#include "../kernels.cuh"

namespace normfused {
template int launch_kernel<__half>(const Launch&, const Call&, void*);
}
