// What a lane of the product with one row computes: its part of a dot product, by FMA
// units over 16-bit weights and on tensor cores over e4m3.
#ifndef LOCKSTEP_KERNELS_GEMV_ROW_DOT_CUH_
#define LOCKSTEP_KERNELS_GEMV_ROW_DOT_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/gemv_elements.cuh"

namespace lockstep::kernels::row {

// A lane's part of x, as it meets the weights. Over e4m3: pairs of f16 for the tensor
// cores, bf16 brought into their range by a power of two of the four lanes that share a
// sum; what that rounds is 2^-38 of their largest.
template <typename W, int S>
struct LaneX {
  float values[S][kPerVector<W>];
};
template <int S>
struct LaneX<__nv_fp8_e4m3, S> {
  uint32_t pairs[S][kPerVector<__nv_fp8_e4m3> / 2];
  float unscale = 1.0f;
};

// The power of two that brings what is at most `largest` into the range of f16, and its inverse.
__device__ __forceinline__ void ScaleToHalf(float largest, float& scale, float& unscale) {
  const int exponent = min(268 - static_cast<int>(__float_as_uint(largest) >> 23), 253);
  scale = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
  unscale = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
}

template <typename T, int S>
__device__ __forceinline__ void PackX(const float (&f)[S][kPerVector<__nv_fp8_e4m3>],
                                      LaneX<__nv_fp8_e4m3, S>& x) {
  constexpr int kElements = kPerVector<__nv_fp8_e4m3>;
  float scale = 1.0f;
  if constexpr (!std::is_same_v<T, __half>) {
    float largest = 0.0f;
#pragma unroll
    for (int s = 0; s < S; ++s) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) largest = fmaxf(largest, fabsf(f[s][e]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    ScaleToHalf(largest, scale, x.unscale);
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i)
      x.pairs[s][i] = PackPair<__half>(f[s][2 * i] * scale, f[s][2 * i + 1] * scale);
  }
}

// This lane's part of the product of one weight row.
template <typename W, int S>
__device__ __forceinline__ float Dot(const uint4 (&w)[S], const LaneX<W, S>& x) {
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    float f[kPerVector<W>];
    UnpackVector<W>(w[s], f);
#pragma unroll
    for (int e = 0; e < kPerVector<W>; e += 2) {
      even = __fmaf_rn(f[e], x.values[s][e], even);
      odd = __fmaf_rn(f[e + 1], x.values[s][e + 1], odd);
    }
  }
  return even + odd;
}

// The same of two rows of e4m3, which would take longer to become floats than to be read:
// a tensor core product whose operands are each lane's own. Lane 4 g + q has elements of
// row g of one weight row and of row g + 8 of the other, and the same elements of column g
// of x: what is wanted is the diagonals, and the rest of the 16 x 8 sums goes unused.
// A lane that HoldsPair gets the sums of four lanes, which x.unscale belongs to.
__device__ __forceinline__ bool HoldsPair(unsigned lane) { return lane % 4 == lane / 8; }
template <int S>
__device__ __forceinline__ void DotPair(const uint4 (&a)[S], const uint4 (&b)[S],
                                        const LaneX<__nv_fp8_e4m3, S>& x, unsigned lane,
                                        float& of_a, float& of_b) {
  float even[4] = {}, odd[4] = {};
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const uint32_t u[4] = {a[s].x, a[s].y, a[s].z, a[s].w};
    const uint32_t v[4] = {b[s].x, b[s].y, b[s].z, b[s].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t low[2], high[2];
      HalvesOfE4M3(u[i], low[0], high[0]);
      HalvesOfE4M3(v[i], low[1], high[1]);
      Multiply<__half>(i % 2 == 0 ? even : odd, low[0], low[1], high[0], high[1], x.pairs[s][2 * i],
                       x.pairs[s][2 * i + 1]);
    }
  }
  const bool second = lane & 4;
  of_a = second ? even[1] + odd[1] : even[0] + odd[0];
  of_b = second ? even[3] + odd[3] : even[2] + odd[2];
}

}  // namespace lockstep::kernels::row

#endif  // LOCKSTEP_KERNELS_GEMV_ROW_DOT_CUH_
