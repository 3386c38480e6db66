#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {
namespace {

template <typename T>
Kernel Find(int dim, int head_tiles, bool ring) {
  using KV = __nv_fp8_e4m3;
  if (dim == 64) return head_tiles == 1 ? DecodeKernel<T, KV, 64, 1> : DecodeKernel<T, KV, 64, 2>;
  if (dim == 128 && head_tiles == 1 && ring) return DecodeKernel<T, KV, 128, 1, true>;
  if (dim == 128) {
    return head_tiles == 1 ? DecodeKernel<T, KV, 128, 1> : DecodeKernel<T, KV, 128, 2>;
  }
  return head_tiles == 1 ? DecodeKernel<T, KV, 256, 1> : DecodeKernel<T, KV, 256, 2>;
}

}  // namespace

Kernel FindBF16OverE4M3(int dim, int head_tiles, bool ring) {
  return Find<__nv_bfloat16>(dim, head_tiles, ring);
}
Kernel FindF16OverE4M3(int dim, int head_tiles, bool ring) {
  return Find<__half>(dim, head_tiles, ring);
}

}  // namespace lockstep::kernels::decode
