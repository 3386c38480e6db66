// x of 16 bits on its way into the products of kernels/skinny_cluster.cuh with weights of e4m3.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_STAGING_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_STAGING_CUH_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/gemv_elements.cuh"
#include "kernels/skinny_cluster_block.cuh"
#include "kernels/skinny_cluster_mma.cuh"
#include "kernels/vector.cuh"

namespace lockstep::kernels::cluster {

// Of two pairs of T, the larger magnitude in each place; a NaN is passed over. a: not negative.
template <typename T>
__device__ __forceinline__ uint32_t LargerPair(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hmax2(x, __habs2(y));
  memcpy(&a, &x, 4);
  return a;
}

// By the threads that multiply: the block's part of x, of kChunks at most, to e4m3, laid out as the
// copy engine would. Each row's part has a scale of its own, so that nobody has to see all of the
// row first. No loop ends early: branches between the loads would cost more.
template <typename T, int kChunks>
__device__ __forceinline__ void StageChunks(const ClusterParams& p, const Shared& s,
                                            const Work& work) {
  static_assert(kStagingLanes == kClusterChunk / 8, "a row's lanes have a chunk");
  const int row = static_cast<int>(threadIdx.x) / kStagingLanes, lane = threadIdx.x % kStagingLanes;
  const int first = work.first_chunk * kClusterChunk + lane * 8;
  const int end = row < p.m ? min(p.k, (work.first_chunk + work.chunks) * kClusterChunk) : 0;
  const T* const from = static_cast<const T*>(p.unquantized_x) + row * p.x_stride + first;
  Packed<T, 8> packed[kChunks] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first + c * kClusterChunk < end) packed[c] = LoadData<T, 8>(from + c * kClusterChunk);
  }
  uint32_t pair = 0;  // by pairs: as floats they would not all fit
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint4& raw = packed[c].raw;
    for (const uint32_t word : {raw.x, raw.y, raw.z, raw.w}) pair = LargerPair<T>(pair, word);
  }
  const float2 both = UnpackPair(pair, T());
  float largest = fmaxf(both.x, both.y);
#pragma unroll
  for (int step = 1; step < kStagingLanes; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const RowScale scale(largest);
  if (lane == 0) s.factors[row] = scale.scale;
  // 16 bytes are two lanes'.
  uint8_t* const to = s.x + row * kClusterChunk + ((lane / 2) ^ (row % 8)) * 16 + lane % 2 * 8;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float v[8];
    Unpack(packed[c], v);
#pragma unroll
    for (float& element : v) element *= scale.inverse;
    if (c < work.chunks) {
      Store(reinterpret_cast<__nv_fp8_e4m3*>(to + c * kMaxStagedRows * kClusterChunk),
            Pack<__nv_fp8_e4m3, 8>(v));
    }
  }
}
template <typename T>
__device__ __forceinline__ void StageQuantized(const ClusterParams& p, const Shared& s,
                                               const Work& work) {
  WaitForPrevious();
  if (work.chunks <= kMaxStagedChunks / 4) {
    StageChunks<T, kMaxStagedChunks / 4>(p, s, work);
  } else if (work.chunks <= kMaxStagedChunks / 2) {
    StageChunks<T, kMaxStagedChunks / 2>(p, s, work);
  } else {
    StageChunks<T, kMaxStagedChunks>(p, s, work);
  }
  FenceStoresBeforeProducts();
  NamedSync(kStaged, kClusterGroups * 128);
}

}  // namespace lockstep::kernels::cluster

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_STAGING_CUH_
