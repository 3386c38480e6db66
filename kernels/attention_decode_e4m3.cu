#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindBF16OverE4M3(int dim, int head_tiles, Way way) {
  return FindFor<__nv_bfloat16, __nv_fp8_e4m3>(dim, head_tiles, way);
}
Kernel FindF16OverE4M3(int dim, int head_tiles, Way way) {
  return FindFor<__half, __nv_fp8_e4m3>(dim, head_tiles, way);
}

}  // namespace lockstep::kernels::decode
