// The kernels for tensors of float64; one file per type, so that they compile in parallel.
#include "../kernels.cuh"

namespace normfused {
template int launch_kernel<double>(const Launch&, const Call&, void*);
}
