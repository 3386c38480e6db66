// Causal attention of spans of many rows over the paged KV cache: row i of a span
// is position begin + i of its sequence and sees positions 0 .. begin + i (the
// last `window` of them), so a chunk of a prompt sees the chunks before it. The
// rows' own k and v must be in the cache already.
//
//   score[j] = scale * (q . k[j]);  out = sum_j softmax(score)[j] * v[j]
//
// FP32 accumulation; f16 and bf16 on tensor cores (wgmma where head_dim is 64,
// 128 or 256 and the cache of the same type or widened, else mma.sync up to 256),
// f32 in plain FP32. The query heads of a KV head share a tile of 128 or 64 rows
// of (position, head), so a tile reads its part of the cache once for all.
// A row's bits do not depend on the other spans of the launch.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PREFILL_H_
#define LOCKSTEP_KERNELS_ATTENTION_PREFILL_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

// Rows first_row .. first_row + count - 1 of the step are positions begin ..
// begin + count - 1 of the slot's sequence. Slot -1 or count 0: nothing.
struct PrefillSpan {
  int32_t slot = -1;
  int32_t first_row = 0;
  int32_t begin = 0;
  int32_t count = 0;
};

// Room for a cache of e4m3 in 16 bits. With it, wgmma takes what it takes of 16 bits;
// without, an e4m3 cache is mma.sync's, which is two to three times slower.
struct PrefillScratch {
  void* k = nullptr;  // [blocks][kv_heads][block_size][head_dim] of `type`, 16-byte aligned
  void* v = nullptr;
  int32_t* block_table = nullptr;  // [slots, table_stride]
  int blocks = 0;  // the sum over the spans of (begin + count) / block_size, rounded up
};

struct PrefillAttentionArgs {
  Type type = Type::kBF16;  // of q and out
  KvLayer kv;               // of `type`, or kE4M3
  int heads = 0;            // of this rank; a multiple of kv.kv_heads

  const PrefillSpan* spans = nullptr;  // [num_spans], on the device
  int num_spans = 0;
  int max_count = 0;                     // no span has more rows
  const int32_t* block_table = nullptr;  // [slots, table_stride]
  int table_stride = 0;

  const void* q = nullptr;  // [rows, q_stride], heads * head_dim used
  int q_stride = 0;         // elements
  void* out = nullptr;      // [rows, out_stride], heads * head_dim written
  int out_stride = 0;

  float scale = 1.0f;
  int window = 0;  // positions seen, the row's own included; 0: all

  PrefillScratch scratch = {};  // of an e4m3 cache; k null: none
};

// Whether `scratch` would serve: an e4m3 cache whose like of 16 bits is wgmma's.
bool PrefillAttentionWidens(const PrefillAttentionArgs& args);

// Once a process and device, before the first launch: loads the kernels.
cudaError_t InitPrefillAttention();

// cudaErrorInvalidValue for head_dim above 512 or more than 32 heads a KV head.
cudaError_t PrefillAttention(const Launch& launch, const PrefillAttentionArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_PREFILL_H_
