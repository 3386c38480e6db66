#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindBF16(const KernelShape& shape) { return FindFor<__nv_bfloat16, __nv_bfloat16>(shape); }

}  // namespace lockstep::kernels::decode
