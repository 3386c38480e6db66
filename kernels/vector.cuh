// Pieces of rows in registers: N elements of T loaded and stored as one access
// of N * sizeof(T) bytes, and sums over a thread block.
#ifndef LOCKSTEP_KERNELS_VECTOR_CUH_
#define LOCKSTEP_KERNELS_VECTOR_CUH_

#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/device.cuh"

namespace lockstep::kernels {

template <int kBytes>
struct RawOf;
template <>
struct RawOf<1> {
  using type = uint8_t;
};
template <>
struct RawOf<2> {
  using type = uint16_t;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

// As loaded; nothing is converted until Unpack, so that many may be in flight.
template <typename T, int N>
struct Packed {
  typename RawOf<sizeof(T) * N>::type raw;
};

// Data that an earlier kernel may have written: only after WaitForPrevious.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> LoadData(const T* at) {
  using Raw = typename RawOf<sizeof(T) * N>::type;
  return {__ldcg(reinterpret_cast<const Raw*>(at))};
}
// The same, through the cache of the multiprocessor: for what is read twice.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> Load(const T* at) {
  using Raw = typename RawOf<sizeof(T) * N>::type;
  return {*reinterpret_cast<const Raw*>(at)};
}
// Weights: constant since long before this kernel.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> LoadConstant(const T* at) {
  using Raw = typename RawOf<sizeof(T) * N>::type;
  return {__ldg(reinterpret_cast<const Raw*>(at))};
}
template <typename T, int N>
__device__ __forceinline__ void Store(T* at, const Packed<T, N>& v) {
  *reinterpret_cast<typename RawOf<sizeof(T) * N>::type*>(at) = v.raw;
}

template <typename T, int N>
__device__ __forceinline__ void Unpack(const Packed<T, N>& v, float (&out)[N]) {
  T elements[N];
  memcpy(static_cast<void*>(elements), &v.raw, sizeof(v.raw));
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = ToFloat(elements[i]);
}
template <typename T>
__device__ __forceinline__ float Rounded(float v) {
  return ToFloat(FromFloat<T>(v));
}

// e4m3, beyond +-448 saturated, NaN kept.
constexpr float kMaxE4M3 = 448.0f;
template <>
__device__ __forceinline__ __nv_fp8_e4m3 FromFloat<__nv_fp8_e4m3>(float v) {
  __nv_fp8_e4m3 out;
  out.__x = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  return out;
}

// By pairs where there are: a conversion of a single one takes four times as long.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> Pack(const float (&v)[N]) {
  Packed<T, N> packed;
  if constexpr (sizeof(T) == 4 || N == 1) {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = FromFloat<T>(v[i]);
    memcpy(&packed.raw, static_cast<const void*>(elements), sizeof(packed.raw));
  } else if constexpr (sizeof(T) == 2) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = PackPair<T>(v[2 * i], v[2 * i + 1]);
    memcpy(&packed.raw, pairs, sizeof(packed.raw));
  } else {
    __nv_fp8x2_storage_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      pairs[i] =
          __nv_cvt_float2_to_fp8x2(make_float2(v[2 * i], v[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
    }
    memcpy(&packed.raw, pairs, sizeof(packed.raw));
  }
  return packed;
}

// Of a row that a product left unscaled: its own factor. After WaitForPrevious.
__device__ __forceinline__ float RowFactor(const ProductScales& scales, int64_t row) {
  return scales.rows != nullptr ? __ldcg(scales.rows + row) : 1.0f;
}
// v, elements [at, at + N) of that row of T, as it is meant; nothing where all is.
template <typename T, int N>
__device__ __forceinline__ void ScaleProduct(const ProductScales& scales, float row_factor, int at,
                                             float (&v)[N]) {
  if (!std::is_same_v<T, __nv_bfloat16> || scales.rows == nullptr) return;
  constexpr int kEach = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    float columns[kEach];
    Unpack(LoadConstant<float, kEach>(scales.columns + at + i), columns);
#pragma unroll
    for (int e = 0; e < kEach; ++e) v[i + e] *= columns[e] * row_factor;
  }
}

// A row's scale from its largest magnitude; values are multiplied by `inverse`,
// which must stay finite: rows of next to nothing become zeros.
struct RowScale {
  float scale, inverse;
  __device__ __forceinline__ explicit RowScale(float max)
      : scale(max < 1e-35f ? 1.0f : max / kMaxE4M3), inverse(1.0f / scale) {}
};

// The sum (or maximum) over a block of at most 1024 threads, in every thread and
// in one fixed order. `scratch`: 32 floats of shared memory that no other
// reduction of the kernel uses: one barrier is then enough.
__device__ __forceinline__ float BlockSum(float v, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = WarpSum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return WarpSum(lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float BlockMax(float v, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = WarpMax(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return WarpMax(lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : 0.0f);
}

// Whether what is at `address` may be accessed 16 bytes at a time; null may.
inline bool Aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_VECTOR_CUH_
