// The vector kernels of the cpu backend, once per instruction set, chosen at run
// time. Every kernel is single-threaded, allocates nothing and touches exactly
// the elements its task names.
//
// All sums have one shape on every instruction set: 16 lanes, lane j taking the
// elements j, j + 16, ... in order, one fused multiply-add each; the lanes then
// added as (i, i+8), (i, i+4), (i, i+2), (i, i+1). (The baseline set has no
// fused multiply-add and rounds twice; within it, all else holds.) So an output
// element depends on its own operands only: not on tiling, batch or threads.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_H_

#include <cstdint>
#include <vector>

#include "model/model_config.h"

namespace lockstep::cpu {

inline constexpr int64_t kLanes = 16;

// y[i][j] = sum over k of x[i][k] * w[j][k], i in [0, m), j in [0, n). K is cut
// into `slices` equal parts; parts are summed apart and added as the binary tree
// of Communicator::AllReduceSum.
struct DirectTask {
  const float* x = nullptr;  // [m, k], rows ldx apart
  int64_t ldx = 0;
  int64_t m = 0;
  const void* w = nullptr;  // [n, k], rows ldw apart
  DType dtype = DType::kFloat32;
  int64_t ldw = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t slices = 1;
  float* y = nullptr;  // rows ldy apart
  int64_t ldy = 0;
};

// The same product for many rows: x packed beforehand by `pack`, a block of at
// most tile.block_n rows of w packed into scratch.
struct PackedTask {
  const float* packed_x = nullptr;
  int64_t m = 0;
  const void* w = nullptr;
  DType dtype = DType::kFloat32;
  int64_t ldw = 0;
  int64_t n = 0;  // at most block_n
  int64_t k = 0;
  int64_t slices = 1;
  float* y = nullptr;
  int64_t ldy = 0;
  float* scratch = nullptr;  // PackedScratchFloats(...)
};

// Attention of one row for the query heads that share one KV head.
struct AttentionTask {
  const float* q = nullptr;  // [heads, head_dim]
  int64_t heads = 0;
  int64_t head_dim = 0;
  const void* k = nullptr;  // the layer's cache at this KV head, block 0, position 0
  const void* v = nullptr;
  DType dtype = DType::kFloat32;
  const uint32_t* table = nullptr;  // block ids
  int64_t block_size = 0;
  int64_t block_stride = 0;    // elements between blocks; positions are head_dim apart
  int64_t begin = 0, end = 0;  // positions seen
  float scale = 1.0f;
  float* scores = nullptr;  // scratch: heads * RoundUp(end - begin, kLanes)
  float* out = nullptr;     // [heads, head_dim]
};

struct Kernels {
  const char* name;

  // Register tile and cache blocks of the packed product.
  int64_t tile_m, tile_n, block_m, block_n, block_k;

  void (*gemm_direct)(const DirectTask& task);
  // Rows [0, rows) of x (rows <= tile_m) into one panel of PackedK() * tile_m floats.
  void (*pack)(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t slices, float* out);
  void (*gemm_packed)(const PackedTask& task);
  void (*attention)(const AttentionTask& task);

  // out may be x. weight_offset is added to the weight (Gemma's 1 + w).
  void (*rms_norm)(const float* x, const float* weight, float weight_offset, float eps, int64_t n,
                   float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* out);
  // out = activation(gate) * up; up null: activation(gate). out may be gate.
  void (*activate)(Activation activation, const float* gate, const float* up, int64_t n,
                   float* out);
  // Rotates pairs (x[i], x[i + half]) in place.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
  void (*widen)(const void* x, DType dtype, int64_t n, float* out);
  void (*narrow)(const float* x, int64_t n, DType dtype, void* out);

  bool (*all_finite)(const float* x, int64_t n);
  float (*max)(const float* x, int64_t n);  // n >= 1
  // out[i] = exp(x[i] - bias); the sum of out. out may be x.
  double (*exp_sum)(const float* x, float bias, int64_t n, float* out);
};

// Floats of one row of a packed operand: each slice padded to whole vectors.
static inline int64_t PackedK(int64_t k, int64_t slices) {
  return slices * ((k / slices + kLanes - 1) / kLanes * kLanes);
}

int64_t PackedScratchFloats(const Kernels& kernels, int64_t k, int64_t slices);

// The best set this processor runs.
const Kernels& BestKernels();
// Every set this processor runs, best first.
std::vector<const Kernels*> AvailableKernels();

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_H_
