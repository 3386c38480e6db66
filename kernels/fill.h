// Weights that need no file, and weights laid out as the matrix kernels want.
//
// A random value depends on its tensor's key and its place in the whole tensor
// alone, and is the one that worker/weights.cc makes on the cpu (--load-format
// dummy), bit for bit: every tp size and both backends hold the same model.
#ifndef LOCKSTEP_KERNELS_FILL_H_
#define LOCKSTEP_KERNELS_FILL_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

// out[r][c] = center + width * u, u in [-1, 1) from
// (key, (first_row + r) * global_cols + first_col + c).
struct FillUniformArgs {
  Type type = Type::kBF16;  // kE4M3: stores value / scale, saturated
  uint64_t key = 0;         // cpu: FNV-1a of the tensor's name
  float center = 0.0f;
  float width = 1.0f;
  float scale = 1.0f;  // kE4M3 alone; (|center| + |width|) / 448 wastes none of its range
  int64_t first_row = 0;
  int64_t first_col = 0;
  int64_t global_cols = 0;
  int64_t rows = 0;  // of out
  int64_t cols = 0;
  void* out = nullptr;
  int64_t row_stride = 0;  // elements; 2 * cols fills every other row (interleaved gate and up)
};
cudaError_t FillUniform(const Launch& launch, const FillUniformArgs& args);

// count elements of `type` at `out`, all `value` (rounded to it, e4m3 saturated).
cudaError_t FillConstant(const Launch& launch, Type type, void* out, int64_t count, float value);

// out [2 * rows, cols]: row 2i is gate's row i, row 2i + 1 up's row i. Contiguous
// on all sides, sources and destination apart. Copies any type's bits.
cudaError_t InterleaveRows(const Launch& launch, Type type, const void* gate, const void* up,
                           int64_t rows, int64_t cols, void* out);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_FILL_H_
