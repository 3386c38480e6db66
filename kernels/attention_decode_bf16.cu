#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindBF16(int dim, int head_tiles, bool ring) {
  using T = __nv_bfloat16;
  if (dim == 64) return head_tiles == 1 ? DecodeKernel<T, T, 64, 1> : DecodeKernel<T, T, 64, 2>;
  if (dim == 128 && head_tiles == 1 && ring) return DecodeKernel<T, T, 128, 1, true>;
  if (dim == 128) return head_tiles == 1 ? DecodeKernel<T, T, 128, 1> : DecodeKernel<T, T, 128, 2>;
  return head_tiles == 1 ? DecodeKernel<T, T, 256, 1> : DecodeKernel<T, T, 256, 2>;
}

}  // namespace lockstep::kernels::decode
