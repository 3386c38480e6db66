// What orders Hopper's warpgroup products: in flight, their sums are no thread's to touch.
#ifndef LOCKSTEP_KERNELS_WGMMA_CUH_
#define LOCKSTEP_KERNELS_WGMMA_CUH_

#include <cstdint>

namespace lockstep::kernels {

// Of a thread that has stored what products are to read from shared memory.
__device__ __forceinline__ void FenceStoresBeforeProducts() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// To be before the first product that uses registers which others wrote.
__device__ __forceinline__ void ProductsFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void ProductsCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void ProductsAwait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of operands and sums across fences and waits.
template <int N>
__device__ __forceinline__ void Pin(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(v[i])::"memory");
}
template <int N>
__device__ __forceinline__ void Pin(uint32_t (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(v[i])::"memory");
}

// All that v is made of is computed here, ahead of a wait for products behind it: ptxas would
// else move it behind the wait, since no product needs it. v is never below 0.
__device__ __forceinline__ void ComputeBeforeAwaiting(float v) {
  if (v < 0.0f) asm volatile("nanosleep.u32 0;" ::: "memory");
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_WGMMA_CUH_
