// Between the QKV product and attention: bias, per-head RMS norm of q and k,
// rotary embedding ("RoFormer", Su et al., 2021, halves of a head paired: x[i]
// with x[i + head_dim/2]), k and v into the paged cache, q in place.
//
//   row of qkv: [heads * head_dim | kv_heads * head_dim | kv_heads * head_dim]
//               q                   k                     v
//
// fp32 between reading and one rounding. A few lanes a head: 16-byte accesses
// where head_dim/2 and the addresses allow. k and v of qkv stay as they were (unscaled too);
// padding rows (slot -1) write nothing. Reads and writes each byte of the row
// once, and 4 * head_dim bytes of the rotary table a row and head (from L2).
//
// head_dim: even, 2 .. 256, else cudaErrorInvalidValue.
#ifndef LOCKSTEP_KERNELS_QKV_FINISH_H_
#define LOCKSTEP_KERNELS_QKV_FINISH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

struct QkvFinishArgs {
  Type type = Type::kBF16;
  int num_rows = 0;
  StepRows rows = {};
  int heads = 0;                 // of this rank
  void* qkv = nullptr;           // [num_rows, qkv_stride] of T
  int qkv_stride = 0;            // elements, >= (heads + 2 * kv_heads) * head_dim
  ProductScales scales = {};     // of qkv
  const void* bias = nullptr;    // [(heads + 2 * kv_heads) * head_dim] of T, or null
  const void* q_norm = nullptr;  // [head_dim] of T, or null; both or neither
  const void* k_norm = nullptr;
  float norm_eps = 1e-6f;
  bool norm_plus_one = false;
  const float2* rotary = nullptr;  // [positions, head_dim / 2] cosine, sine; null: none
  KvLayer kv = {};                 // type T or kE4M3 (stored = value / scale, saturated)
};
cudaError_t QkvFinish(const Launch& launch, const QkvFinishArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_QKV_FINISH_H_
