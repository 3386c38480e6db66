// What the tensor-core prefill kernels are told, and where their instances are.
// Between attention_prefill.cu and the files that instantiate them.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PREFILL_LAUNCH_H_
#define LOCKSTEP_KERNELS_ATTENTION_PREFILL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention_factors.h"
#include "kernels/attention_prefill.h"
#include "kernels/types.h"

namespace lockstep::kernels::prefill {

struct Params {
  const PrefillSpan* spans;
  const int32_t* block_table;
  int table_stride;
  const void* k;
  const void* v;
  int kv_heads, block_size, head_dim, group;
  const void* q;
  void* out;
  int q_stride, out_stride;
  AttentionFactors factors;
  int window;
};

using Kernel = void (*)(Params);

// mma.sync: tiles of 64 rows, 128 threads.
constexpr int kMmaRows = 64;
constexpr int kMmaThreads = 128;
// Cached positions a step; fewer where a head is wide.
constexpr int MmaPositions(int dim) { return dim <= 128 ? 64 : 32; }
constexpr size_t MmaSharedBytes(int dim) {
  return size_t{2} * 2 * MmaPositions(dim) * dim * 2;  // two stages of k and v, 16 bits each
}
// dim: head_dim rounded up to 64, 128 or 256.
Kernel FindMma(Type type, Type kv_type, int dim);

}  // namespace lockstep::kernels::prefill

#endif  // LOCKSTEP_KERNELS_ATTENTION_PREFILL_LAUNCH_H_
