// The kernels for tensors of bfloat16; one file per type, so that they compile in parallel.
#include "../kernels.cuh"

namespace normfused {
template int launch_kernel<__nv_bfloat16>(const Launch&, const Call&, void*);
}
