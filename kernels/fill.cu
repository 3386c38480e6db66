#include "kernels/fill.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

// In [-1, 1): the top 24 bits of splitmix64's finaliser (Steele et al., 2014).
__device__ __forceinline__ float UniformAt(uint64_t key, uint64_t index) {
  uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<float>(static_cast<int32_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

// N neighbours of a row a thread, grid-stride over all of them.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    FillUniformKernel(const __grid_constant__ FillUniformArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int64_t pieces_per_row = a.cols / N, pieces = a.rows * pieces_per_row;
  const float inverse = 1.0f / a.scale;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / pieces_per_row, col = (i - row * pieces_per_row) * N;
    const int64_t index = (a.first_row + row) * a.global_cols + a.first_col + col;
    float v[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      // No fused multiply-add: the cpu's values have two roundings.
      v[e] = __fadd_rn(a.center, __fmul_rn(a.width, UniformAt(a.key, index + e)));
      if constexpr (sizeof(T) == 1) v[e] *= inverse;
    }
    Store(static_cast<T*>(a.out) + row * a.row_stride + col, Pack<T, N>(v));
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) FillConstantKernel(T* out, int64_t count, float value) {
  TriggerDependents();
  WaitForPrevious();
  float v[N];
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] = value;
  const Packed<T, N> packed = Pack<T, N>(v);
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; i < count;
       i += int64_t{gridDim.x} * kThreads * N) {
    Store(out + i, packed);
  }
}

dim3 Grid(int64_t pieces) {
  const int64_t blocks = (pieces + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

template <typename T>
cudaError_t FillUniformOf(const Launch& launch, const FillUniformArgs& a) {
  constexpr int kN = 16 / sizeof(T);
  if (a.cols % kN == 0 && a.row_stride % kN == 0 && Aligned16(a.out)) {
    return LaunchKernel(launch, FillUniformKernel<T, kN>, Grid(a.rows * a.cols / kN),
                        dim3(kThreads), 0, 1, a);
  }
  return LaunchKernel(launch, FillUniformKernel<T, 1>, Grid(a.rows * a.cols), dim3(kThreads), 0, 1,
                      a);
}

template <typename T>
cudaError_t FillConstantOf(const Launch& launch, void* out, int64_t count, float value) {
  constexpr int kN = 16 / sizeof(T);
  T* const at = static_cast<T*>(out);
  if (count % kN == 0 && Aligned16(out)) {
    return LaunchKernel(launch, FillConstantKernel<T, kN>, Grid(count / kN), dim3(kThreads), 0, 1,
                        at, count, value);
  }
  return LaunchKernel(launch, FillConstantKernel<T, 1>, Grid(count), dim3(kThreads), 0, 1, at,
                      count, value);
}

}  // namespace

cudaError_t FillUniform(const Launch& launch, const FillUniformArgs& a) {
  if (a.rows < 0 || a.cols < 0 || a.row_stride < a.cols || a.first_row < 0 || a.first_col < 0 ||
      a.global_cols < a.first_col + a.cols || !(a.scale > 0.0f)) {
    return cudaErrorInvalidValue;
  }
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  switch (a.type) {
    case Type::kF32:
      return FillUniformOf<float>(launch, a);
    case Type::kF16:
      return FillUniformOf<__half>(launch, a);
    case Type::kBF16:
      return FillUniformOf<__nv_bfloat16>(launch, a);
    case Type::kE4M3:
      return FillUniformOf<__nv_fp8_e4m3>(launch, a);
  }
  return cudaErrorInvalidValue;
}

cudaError_t FillConstant(const Launch& launch, Type type, void* out, int64_t count, float value) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  switch (type) {
    case Type::kF32:
      return FillConstantOf<float>(launch, out, count, value);
    case Type::kF16:
      return FillConstantOf<__half>(launch, out, count, value);
    case Type::kBF16:
      return FillConstantOf<__nv_bfloat16>(launch, out, count, value);
    case Type::kE4M3:
      return FillConstantOf<__nv_fp8_e4m3>(launch, out, count, value);
  }
  return cudaErrorInvalidValue;
}

cudaError_t InterleaveRows(const Launch& launch, Type type, const void* gate, const void* up,
                           int64_t rows, int64_t cols, void* out) {
  if (rows < 0 || cols < 0) return cudaErrorInvalidValue;
  if (rows == 0 || cols == 0) return cudaSuccess;
  const size_t row_bytes = static_cast<size_t>(cols) * TypeBytes(type);
  const auto place = [&](const void* from, size_t first_byte) {
    return cudaMemcpy2DAsync(static_cast<char*>(out) + first_byte, 2 * row_bytes, from, row_bytes,
                             row_bytes, static_cast<size_t>(rows), cudaMemcpyDeviceToDevice,
                             launch.stream);
  };
  if (const cudaError_t error = place(gate, 0); error != cudaSuccess) return error;
  return place(up, row_bytes);
}

}  // namespace lockstep::kernels
