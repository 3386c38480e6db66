// Blocks of a cluster and each other's shared memory (sm_90 and later; before, a block is
// alone and nothing may be sent).
//
// What is sent counts itself, in bytes, at a barrier of its receiver; so nobody needs
// the cluster's memory in order. That order (arrive.release, wait.acquire) also waits
// for every store to global memory, which behind a stream of weights takes microseconds.
#ifndef LOCKSTEP_KERNELS_CLUSTER_CUH_
#define LOCKSTEP_KERNELS_CLUSTER_CUH_

#include <cstdint>

#include "kernels/bulk_copy.cuh"

namespace lockstep::kernels {

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// A meeting of all threads of the cluster; it orders barriers initialised before
// FenceBarrierInit, and nothing else.
__device__ __forceinline__ void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void ClusterAwait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The address in block `rank` of what lies at `address` here.
__device__ __forceinline__ uint32_t AddressIn(uint32_t address, uint32_t rank) {
  uint32_t mapped = address;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
#endif
  return mapped;
}
// Count as 16 and 8 bytes at `barrier`, of the same block as `address`.
__device__ __forceinline__ void SendRemote(uint32_t address, float4 v, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
      " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void SendRemote(uint32_t address, float2 v, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(address),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
#endif
}
// For reads of one's own shared memory that have ended.
__device__ __forceinline__ void ArriveRemote(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_CLUSTER_CUH_
