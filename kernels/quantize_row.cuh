// A row of 16-bit values that a block has in its registers, as e4m3 with its scale: the end of
// kernels that quantise what they make.
#ifndef LOCKSTEP_KERNELS_QUANTIZE_ROW_CUH_
#define LOCKSTEP_KERNELS_QUANTIZE_ROW_CUH_

#include <cuda_runtime_api.h>

#include <type_traits>

#include "kernels/vector.cuh"

namespace lockstep::kernels {

constexpr int kRowMaxThreads = 1024;
constexpr int kRowPiece = 8;  // elements: 16 bytes
constexpr int kRowMaxWidth = 4 * kRowMaxThreads * kRowPiece;

// Where the thread's j-th piece begins; it may be past the row.
__device__ __forceinline__ int RowPieceAt(int j) {
  return (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kRowPiece;
}

// By all threads of the block; what is past `width` is not looked at.
template <typename T, int kPieces>
__device__ __forceinline__ void QuantizeRow(const Packed<T, kRowPiece> (&row)[kPieces], int width,
                                            __nv_fp8_e4m3* out, float* scale_out) {
  __shared__ float scratch[32];
  float max = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (RowPieceAt(j) >= width) continue;
    float v[kRowPiece];
    Unpack(row[j], v);
#pragma unroll
    for (float element : v) max = fmaxf(max, fabsf(element));
  }
  const RowScale scale(BlockMax(max, scratch));
  if (threadIdx.x == 0) *scale_out = scale.scale;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (RowPieceAt(j) >= width) continue;
    float v[kRowPiece];
    Unpack(row[j], v);
#pragma unroll
    for (float& element : v) element *= scale.inverse;
    Store(out + RowPieceAt(j), Pack<__nv_fp8_e4m3, kRowPiece>(v));
  }
}

// run(how many pieces a thread takes, as a constant; threads) for a row of `width`.
template <typename Run>
cudaError_t WithRowPieces(int width, Run run) {
  const int pieces = width / kRowPiece;
  const auto of = [&](auto each) { return run(each, ((pieces + each - 1) / each + 31) / 32 * 32); };
  if (pieces <= 512) return of(std::integral_constant<int, 1>());
  if (pieces <= 2048) return of(std::integral_constant<int, 2>());
  return of(std::integral_constant<int, 4>());
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_QUANTIZE_ROW_CUH_
