#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindBF16(int dim, int head_tiles, Way way) {
  return FindFor<__nv_bfloat16, __nv_bfloat16>(dim, head_tiles, way);
}

}  // namespace lockstep::kernels::decode
