// Boxes of tensors by the copy engine (sm_90 and later), as CUtensorMap describes them.
#ifndef LOCKSTEP_KERNELS_BOX_COPY_CUH_
#define LOCKSTEP_KERNELS_BOX_COPY_CUH_

#include <cuda.h>

#include <cstdint>

#include "kernels/bulk_copy.cuh"

namespace lockstep::kernels {

// Of one in two dimensions, from (x, y) on. By one thread; its bytes count at `barrier`.
__device__ __forceinline__ void CopyBox(void* to, const CUtensorMap* map, int x, int y,
                                        uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(x), "r"(y), "r"(SharedAddress(barrier))
      : "memory");
}
// Of one in three, from (x, y, z) on.
__device__ __forceinline__ void CopyBox(void* to, const CUtensorMap* map, int x, int y, int z,
                                        uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(x), "r"(y), "r"(z), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_BOX_COPY_CUH_
