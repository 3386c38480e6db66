#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindBF16OverE4M3(const KernelShape& shape) {
  return FindFor<__nv_bfloat16, __nv_fp8_e4m3>(shape);
}
Kernel FindF16OverE4M3(const KernelShape& shape) { return FindFor<__half, __nv_fp8_e4m3>(shape); }

}  // namespace lockstep::kernels::decode
