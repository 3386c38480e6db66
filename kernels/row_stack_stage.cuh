// How the row that a product's weights meet comes into shared memory: as the norm of what all
// ranks have summed, or as words of other blocks; of T, or for e4m3 weights of f16.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_STAGE_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_STAGE_CUH_

#include <cstring>
#include <type_traits>

#include "kernels/exchange_words.cuh"
#include "kernels/gemv_row_dot.cuh"
#include "kernels/row_stack_product.cuh"
#include "kernels/row_stack_words.cuh"

namespace lockstep::kernels::stack {

// The largest magnitude among vectors of bf16; of f16 nobody needs it.
template <typename T>
class Largest {
 public:
  __device__ __forceinline__ void See(const uint4& v) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        __nv_bfloat162 pair;
        memcpy(&pair, &word, sizeof(pair));
        pair_ = __hmax2(pair_, __habs2(pair));
      }
    }
  }
  __device__ __forceinline__ float value() const {
    return fmaxf(__low2float(pair_), __high2float(pair_));
  }

 private:
  __nv_bfloat162 pair_ = __float2bfloat162_rn(0.0f);
};
// Behind a barrier: the power of two that brings the row into the range of f16. Each of
// shared.largest times `factor` is no less than some part of it.
template <typename T>
__device__ __forceinline__ float ScaleOfHalves(const Shared& shared, float factor) {
  if (!std::is_same_v<T, __nv_bfloat16>) return 1.0f;
  float largest = 0.0f, scale, unscale;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  row::ScaleToHalf(largest * factor, scale, unscale);
  if (threadIdx.x == 0) *shared.unscale = unscale;
  return scale;
}
// A vector of T as one of f16.
template <typename T>
__device__ __forceinline__ uint4 AsHalves(const uint4& v, float scale) {
  if constexpr (std::is_same_v<T, __half>) return v;
  float f[8];
  UnpackVector<T>(v, f);
#pragma unroll
  for (int e = 0; e < 8; ++e) f[e] *= scale;
  return PackVector<__half>(f);
}
// Non-negative floats are ordered as their bits.
__device__ __forceinline__ float WarpLargest(float v) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
}

// Adds the sums of exchange `number`, of kRanks ranks at most, to this thread's part of the
// residual, kBatch vectors at a time. Returns the squares of what that makes, and takes note
// of its largest.
template <typename T, int kBatch, int kRanks>
__device__ __forceinline__ float AddSums(const Params& p, const Shared& shared, uint32_t number,
                                         Largest<T>& largest) {
  const int end = p.hidden / 8, tid = threadIdx.x;
  float squares = 0.0f;
#pragma unroll 1
  for (int warps = tid / 32 * 32; warps < end; warps += kBatch * kThreads) {
    const int from = warps + tid % 32;
    float sums[kBatch][8] = {};
    if constexpr (kRanks > 0)
      SumsOfRanks<T, kBatch, kRanks>(p.exchange, number, from, kThreads, end, sums);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = from + j * kThreads;
      if (v >= end) continue;
      float f[8];
      UnpackVector<T>(shared.residual[v], f);
#pragma unroll
      for (int e = 0; e < 8; ++e) f[e] += sums[j][e];
      const uint4 sum = PackVector<T>(f);
      shared.residual[v] = sum;
      largest.See(sum);
      UnpackVector<T>(sum, f);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares = __fmaf_rn(f[e], f[e], squares);
    }
  }
  return squares;
}

// Adds the sums of exchange `number` to the residual, unless `first`, which has none, and
// leaves its RMS norm in shared.x, if `halves` as e4m3 weights want it.
template <typename T>
__device__ __forceinline__ void StageNorm(const Params& p, const Shared& shared, bool first,
                                          uint32_t number, const void* weights, bool halves) {
  const int end = p.hidden / 8, tid = threadIdx.x;
  uint4 weight[kRowVectors];  // on their way before anything is waited for
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    weight[i] = v < end ? __ldg(static_cast<const uint4*>(weights) + v) : uint4{};
  }
  Largest<T> largest_weight, largest;
  if (halves) {
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) largest_weight.See(weight[i]);
  }
  float squares;
  const int size = first ? 0 : p.exchange.size;
  if (size == 0) {
    squares = AddSums<T, 1, 0>(p, shared, number, largest);
  } else if (size == 1) {
    squares = AddSums<T, 2, 1>(p, shared, number, largest);
  } else if (size <= 4) {
    squares = AddSums<T, 2, 4>(p, shared, number, largest);
  } else {
    squares = AddSums<T, 1, kMaxPeers>(p, shared, number, largest);
  }
  squares = WarpSum(squares);
  if (halves) {
    const float of_lane = largest.value() * (largest_weight.value() + fabsf(p.weight_offset));
    const float of_warp = WarpLargest(of_lane);
    if (tid % 32 == 0) shared.largest[tid / 32] = of_warp;
  }
  if (tid % 32 == 0) shared.norms[tid / 32] = squares;
  SyncThreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.norms[w];
  const float scale = rsqrtf(__fdividef(total, static_cast<float>(p.hidden)) + p.eps);
  const float of_halves = halves ? ScaleOfHalves<T>(shared, scale) : 1.0f;
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    if (v >= end) continue;
    float f[8], w[8];
    UnpackVector<T>(shared.residual[v], f);
    UnpackVector<T>(weight[i], w);
#pragma unroll
    for (int e = 0; e < 8; ++e) f[e] *= scale * (w[e] + p.weight_offset);
    const uint4 normed = PackVector<T>(f);
    if (halves) {
      *shared.Halves(v) = AsHalves<T>(normed, of_halves);
    } else {
      reinterpret_cast<uint4*>(shared.x)[v] = normed;
    }
  }
  SyncThreads();
}

// A row that other blocks made, into shared.x; kHalves: as e4m3 weights want it.
template <typename T, bool kHalves>
__device__ __forceinline__ void StageWords(const Params& p, const Shared& shared, uint32_t number,
                                           const uint32_t* words, int vectors) {
  constexpr int kBatch = 4;
  const int tid = threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(words);
  Largest<T> largest;
#pragma unroll 1
  for (int warps = tid / 32 * 32; warps < vectors; warps += kBatch * kThreads) {
    const int first = warps + tid % 32;
    uint4 batch[kBatch];
    AwaitWords<kBatch>(p.exchange, number, from, first, kThreads, vectors - 1, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = first + i * kThreads;
      if (v >= vectors) continue;
      *(kHalves ? shared.Halves(v) : reinterpret_cast<uint4*>(shared.x) + v) = batch[i];
      if (kHalves) largest.See(batch[i]);
    }
  }
  if constexpr (kHalves && std::is_same_v<T, __nv_bfloat16>) {
    const float of_warp = WarpLargest(largest.value());
    if (tid % 32 == 0) shared.largest[tid / 32] = of_warp;
    SyncThreads();
    const float scale = ScaleOfHalves<T>(shared, 1.0f);
#pragma unroll 1
    for (int v = tid; v < vectors; v += kThreads) {
      *shared.Halves(v) = AsHalves<T>(*shared.Halves(v), scale);
    }
  }
  SyncThreads();
}

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_STAGE_CUH_
