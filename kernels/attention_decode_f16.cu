#include "kernels/attention_decode_kernel.cuh"

namespace lockstep::kernels::decode {

Kernel FindF16(int dim, int head_tiles, Way way) {
  return FindFor<__half, __half>(dim, head_tiles, way);
}

}  // namespace lockstep::kernels::decode
