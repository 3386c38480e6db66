// The residual stream between two matrix products, one thread block a row:
//
//   v = x [* scale] [+ bias]           x: a sum that is already over all ranks, or one
//                                         rank's product that has its scales yet to meet,
//                                         or is still in parts
//   v = post(v)                        Gemma 3's sandwich norms
//   v = v + residual [+ position row]
//   residual = v, rounded to T
//   normed = next(residual)            or residual itself, where there is no norm
//
// All in fp32 between one rounding of the residual and one of the result. A
// row's result depends on that row and on `hidden` alone. Per row: 2 or 3 reads
// and 2 writes of hidden * sizeof(T) bytes.
//
// hidden: 1 .. 16384. Rows are contiguous. Addresses and hidden * sizeof(T) that
// are multiples of 16 take the fast path; others are right but slow. Anything
// else: cudaErrorInvalidValue.
#ifndef LOCKSTEP_KERNELS_NORM_H_
#define LOCKSTEP_KERNELS_NORM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

enum class NormKind : uint8_t {
  kNone,
  kRms,   // x / sqrt(mean(x^2) + eps) * w
  kLayer  // (x - mean) / sqrt(var + eps) * w + b
};

struct NormSpec {
  NormKind kind = NormKind::kNone;
  const void* weight = nullptr;  // [hidden] of T; null: ones (norms without tensors)
  const void* bias = nullptr;    // [hidden] of T, kLayer; null: zeros
  float eps = 1e-5f;
  bool plus_one = false;  // kRms: times (1 + w)
};

// normed = norm(x). x and normed may be the same.
struct NormArgs {
  Type type = Type::kBF16;
  int num_rows = 0;
  int hidden = 0;
  const int32_t* slot = nullptr;  // [num_rows]; rows of slot -1 are skipped; null: none
  const void* x = nullptr;
  NormSpec norm = {};
  void* normed = nullptr;  // null: only quantized
  QuantizedRows quantized = {};
};
cudaError_t Norm(const Launch& launch, const NormArgs& args);

// residual = x * scale + learned position; normed = norm(residual), or a copy.
// x is the embedding summed over the ranks. `scale` is rounded to T first, as
// models of 16 bits do. x and residual may be the same.
struct AfterEmbedArgs {
  Type type = Type::kBF16;
  int num_rows = 0;
  int hidden = 0;
  StepRows rows = {};  // slot and position; slot null: every row is live
  const void* x = nullptr;
  float scale = 1.0f;
  const void* position_table = nullptr;  // [positions, hidden]; null: none
  int position_offset = 0;               // OPT: 2
  NormSpec norm = {};
  void* residual = nullptr;
  void* normed = nullptr;  // null: not wanted
  QuantizedRows quantized = {};
};
cudaError_t AfterEmbed(const Launch& launch, const AfterEmbedArgs& args);

// What follows an all-reduce. residual_in and residual_out may be the same, and
// x may be normed.
struct ReduceTailArgs {
  Type type = Type::kBF16;
  int num_rows = 0;
  int hidden = 0;
  const int32_t* slot = nullptr;  // as above
  const void* x = nullptr;
  // [kProductParts][num_rows, hidden], whose sum is read instead of x; or null.
  const float* x_parts = nullptr;
  ProductScales x_scales = {};  // its rows may be quantized.scales
  const void* bias = nullptr;   // [hidden] of T, or null
  NormSpec post = {};           // before the add
  const void* residual_in = nullptr;
  void* residual_out = nullptr;
  NormSpec next = {};             // after it
  bool norm_is_residual = false;  // residual_out = normed
  void* normed = nullptr;         // null: not wanted
  QuantizedRows quantized = {};
};
cudaError_t ReduceTail(const Launch& launch, const ReduceTailArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_NORM_H_
