// Rows of T -> rows of e4m3 with a fp32 scale each: value = stored * scale.
//
//   scale = max |x| / 448 (1 where max |x| < 1e-35);  stored = e4m3(x * (1 / scale))
//
// The same kernel serves weights (a row: an output's [K]) and activations (a
// row: a token). A row's result depends on that row alone. A NaN stays one, and
// an infinity makes the whole row NaN: neither is hidden.
#ifndef LOCKSTEP_KERNELS_QUANTIZE_H_
#define LOCKSTEP_KERNELS_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

struct QuantizeRowsArgs {
  Type type = Type::kBF16;  // of `in`
  int num_rows = 0;
  int width = 0;
  const int32_t* slot = nullptr;  // [num_rows]; rows of slot -1 are skipped; null: none
  const void* in = nullptr;       // [num_rows, in_stride]
  int64_t in_stride = 0;          // elements
  void* out = nullptr;            // [num_rows, out_stride] e4m3
  int64_t out_stride = 0;
  float* scales = nullptr;  // [num_rows]
};
cudaError_t QuantizeRows(const Launch& launch, const QuantizeRowsArgs& args);

// out = stored * scale of its row, as T.
struct DequantizeRowsArgs {
  Type type = Type::kBF16;  // of `out`
  int num_rows = 0;
  int width = 0;
  const void* in = nullptr;  // [num_rows, in_stride] e4m3
  int64_t in_stride = 0;
  const float* scales = nullptr;  // [num_rows]
  void* out = nullptr;            // [num_rows, out_stride]
  int64_t out_stride = 0;
};
cudaError_t DequantizeRows(const Launch& launch, const DequantizeRowsArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_QUANTIZE_H_
