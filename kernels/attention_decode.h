// Attention of single rows over the paged KV cache: row r is position p of its
// sequence and sees positions 0 .. p (the last `window` of them).
//
//   score[j] = scale * (q . k[j]);  out = sum_j softmax(score)[j] * v[j]
//
// One thread block takes all query heads of a KV head over a share of the
// context, so each cached byte is read once: bytes = 2 * context * kv_heads *
// head_dim * sizeof(KV) a row. The shares of a row are merged in a fixed order
// inside a thread-block cluster, and for very long contexts across clusters
// through the workspace: the same launch gives the same bits. By a plan all shares are of one
// size instead (attention_decode_deal.cuh), so that a long row does not keep the others waiting.
//
// FP32 accumulation; with f16 and bf16 the products run on tensor cores (the
// probabilities rounded to the type), with f32 in plain FP32.
//
// Fast path: q and KV of one 16-bit type or KV e4m3, head_dim up to 256 with rows of a multiple
// of 16 bytes (64, 128 and 256 without padding), heads / kv_heads <= 16, block_size a
// power of two of at least 16, 16-byte aligned rows. Everything else: a plain kernel, one
// block a row and KV head, head_dim up to 512, heads / kv_heads <= 32 (f32, or
// KV of q's type or e4m3).
// Padding rows (slot -1) read and write nothing.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_H_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

struct DecodeAttentionArgs {
  Type type = Type::kBF16;  // of q and out
  int num_rows = 0;
  StepRows rows;
  KvLayer kv;     // of `type`, or kE4M3
  int heads = 0;  // of this rank; a multiple of kv.kv_heads

  const void* q = nullptr;  // [num_rows, q_stride], heads * head_dim used
  int q_stride = 0;         // elements
  void* out = nullptr;      // [num_rows, out_stride], heads * head_dim written
  int out_stride = 0;

  float scale = 1.0f;
  int window = 0;  // positions seen, the row's own included; 0: all
  // No row's position reaches this. Decides the grid alone: a loose bound costs
  // thread blocks that end at once, never work.
  int max_context = 0;
  // Thread blocks a row and KV head: 0 chooses by num_rows; a power of two up to
  // 16 makes a row's bits independent of how many rows there are.
  int splits = 0;
  // Tiles that a warp has on their way through shared memory, where the shape has such: 0 chooses
  // by num_rows; 1, 2, or -1 for none. The same bits.
  int ring = 0;
  // By PlanDecodeAttention, of the same rows, heads, type and window: the work is then dealt out by
  // tiles of all rows together, whatever their lengths. It needs a workspace; a row's bits
  // depend on the others' lengths; splits and ring mean nothing.
  const void* plan = nullptr;
  void* workspace = nullptr;  // DecodeAttentionWorkspaceBytes, zeroed once

  // The caller's word that slots, positions, tables and every position before a
  // row's own were written before the launch ahead of the previous one: they are
  // then read while the previous kernel still runs. So no two rows are of one
  // sequence.
  bool history_ready = false;

  // Rotary embedding and the cache write in the same launch, when fresh_k is
  // set: q is then rotated as it is read, and row r's own k and v come from
  // fresh_k/v + r * q_stride (kv_heads * head_dim each, k not yet rotated) and
  // are written to the cache; no two rows are of one sequence. head_dim must be a multiple of 16
  // (fast path).
  const void* fresh_k = nullptr;
  const void* fresh_v = nullptr;
  const float2* rotary = nullptr;  // [positions, head_dim / 2] cosine, sine; null: none
  // With fresh_k, on the fast path: of the rows that q, fresh_k and fresh_v are parts of, which
  // begin with q.
  ProductScales scales = {};
};

// Whether the fresh_k form serves these shapes; without it, QkvFinish goes first.
bool DecodeAttentionTakesFresh(const DecodeAttentionArgs& args);

// Enough for any launch with at most these many rows and this much context.
size_t DecodeAttentionWorkspaceBytes(int heads, int kv_heads, int head_dim, int max_rows,
                                     int max_context);

// Whether a plan pays for such rows.
bool DecodeAttentionDeals(const DecodeAttentionArgs& args);
size_t DecodeAttentionPlanBytes();
// Writes the plan of all launches of a step with these rows, heads, types and window. Nothing
// behind it begins before it is written.
cudaError_t PlanDecodeAttention(const Launch& launch, const DecodeAttentionArgs& args, void* plan);

// Once a process and device, before the first launch: loads the kernels.
cudaError_t InitDecodeAttention();

// cudaErrorInvalidValue for shapes outside the above.
cudaError_t DecodeAttention(const Launch& launch, const DecodeAttentionArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_H_
