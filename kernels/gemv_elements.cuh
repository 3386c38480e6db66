// Weights as they lie in memory, 16 bytes at a time, and the small device functions
// that the decode products share.
#ifndef LOCKSTEP_KERNELS_GEMV_ELEMENTS_CUH_
#define LOCKSTEP_KERNELS_GEMV_ELEMENTS_CUH_

#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/gemv_plan.h"

namespace lockstep::kernels {

__device__ __forceinline__ float2 UnpackPair(uint32_t word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 UnpackPair(uint32_t word, __half) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  return __half22float2(pair);
}

template <typename W>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(W));

template <typename W>
__device__ __forceinline__ void UnpackVector(const uint4& v, float (&out)[kPerVector<W>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 2) {
      const float2 pair = UnpackPair(words[i], W());
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    } else {
      uint32_t halves[2];
      HalvesOfE4M3(words[i], halves[0], halves[1]);
      const float2 low = UnpackPair(halves[0], __half()), high = UnpackPair(halves[1], __half());
      out[4 * i] = low.x;
      out[4 * i + 1] = low.y;
      out[4 * i + 2] = high.x;
      out[4 * i + 3] = high.y;
    }
  }
}
template <typename T>
__device__ __forceinline__ uint4 PackVector(const float (&v)[8]) {
  return {PackPair<T>(v[0], v[1]), PackPair<T>(v[2], v[3]), PackPair<T>(v[4], v[5]),
          PackPair<T>(v[6], v[7])};
}

// c [16][8] += a [16][16] . b [16][8] on tensor cores, both of type O.
template <typename O>
__device__ __forceinline__ void Multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<O, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ float Gated(GemvEpilogue epilogue, float gate, float up) {
  if (epilogue == GemvEpilogue::kSiluGate) return __fdividef(gate, 1.0f + __expf(-gate)) * up;
  const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return 0.5f * gate * (1.0f + tanhf(inner)) * up;
}

// Orders as the value, and among equals the lower id first.
__device__ __forceinline__ uint64_t LogitKey(float value, int id) {
  if (!isfinite(value)) return kPoisonedKey;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 and 0 are equals
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(id);
}

// Loads the kernel, and settles how an SM divides its memory: an SM that changes
// that between two kernels first runs empty.
template <typename Kernel>
cudaError_t AllowShared(Kernel* kernel) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxGemvShared));
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_ELEMENTS_CUH_
