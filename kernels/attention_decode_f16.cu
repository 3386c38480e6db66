#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindF16(const KernelShape& shape) { return FindFor<__half, __half>(shape); }

}  // namespace lockstep::kernels::decode
