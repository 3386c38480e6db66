// What the two kernels of norm.h share: their argument, and which of them runs.
#ifndef LOCKSTEP_KERNELS_NORM_ROWS_CUH_
#define LOCKSTEP_KERNELS_NORM_ROWS_CUH_

#include "kernels/norm.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {

// The chain of norm.h; what is null or kNone is not there.
struct RowArgs {
  int hidden = 0;
  const int32_t* slot = nullptr;
  const void* x = nullptr;
  const float* x_parts = nullptr;  // read instead of x
  int64_t part_stride = 0;
  ProductScales x_scales = {};
  float scale = 1.0f;
  const void* bias = nullptr;
  NormSpec post = {};
  const void* residual_in = nullptr;
  const void* position_table = nullptr;
  const int32_t* position = nullptr;
  int position_offset = 0;
  void* residual_out = nullptr;
  NormSpec next = {};
  bool norm_is_residual = false;
  void* normed = nullptr;
  QuantizedRows quantized = {};
};

// Most layers of most models need no more of the chain than
//
//   residual += x;  normed = rms(residual)      -> T, e4m3, or both
//
// for which a kernel a quarter as long exists. False: not this row.
bool IsPlain(Type type, const RowArgs& args);
cudaError_t LaunchPlain(const Launch& launch, Type type, int num_rows, const RowArgs& args);

// N elements of x, loaded and not yet looked at.
template <typename T, int N, bool kParts>
struct XPiece {
  Packed<T, N> x = {};
  __device__ __forceinline__ void Load(const RowArgs& a, int64_t at) {
    x = LoadData<T, N>(static_cast<const T*>(a.x) + at);
  }
  __device__ __forceinline__ void Get(float (&v)[N]) const { Unpack(x, v); }
};
template <typename T, int N>
struct XPiece<T, N, true> {
  static constexpr int kEach = N < 4 ? N : 4;
  Packed<float, kEach> parts[kProductParts][N / kEach] = {};
  __device__ __forceinline__ void Load(const RowArgs& a, int64_t at) {
#pragma unroll
    for (int p = 0; p < kProductParts; ++p) {
#pragma unroll
      for (int i = 0; i < N / kEach; ++i)
        parts[p][i] = LoadData<float, kEach>(a.x_parts + p * a.part_stride + at + i * kEach);
    }
  }
  __device__ __forceinline__ void Get(float (&v)[N]) const {
#pragma unroll
    for (int i = 0; i < N / kEach; ++i) {
      float sum[kEach], f[kEach];
      Unpack(parts[0][i], sum);
#pragma unroll
      for (int p = 1; p < kProductParts; ++p) {
        Unpack(parts[p][i], f);
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum[e] += f[e];
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) v[i * kEach + e] = sum[e];
    }
  }
};

// Whether all of a row may be accessed 16 bytes at a time.
bool IsWide(Type type, const RowArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_NORM_ROWS_CUH_
