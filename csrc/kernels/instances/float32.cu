// The kernels for tensors of float32; one file per type, so that they compile in parallel.
#include "../kernels.cuh"

namespace normfused {
template int launch_kernel<float>(const Launch&, const Call&, void*);
}
