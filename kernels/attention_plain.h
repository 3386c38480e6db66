// Attention for what the fast kernels do not take: f32, any head_dim up to 512,
// any block size. One thread block a row and KV head, plain FP32 arithmetic, 64
// positions at a time. Called by DecodeAttention and PrefillAttention alone; the
// fields mean what they mean there.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PLAIN_H_
#define LOCKSTEP_KERNELS_ATTENTION_PLAIN_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention_prefill.h"
#include "kernels/types.h"

namespace lockstep::kernels {

struct PlainAttentionArgs {
  Type type = Type::kBF16;
  KvLayer kv;
  int heads = 0;
  StepRows rows;                       // single rows, or, with spans, the block table alone
  const PrefillSpan* spans = nullptr;  // null: single rows
  int num_spans = 1;
  int max_count = 0;  // rows of the longest span, or single rows
  const void* q = nullptr;
  int q_stride = 0;
  void* out = nullptr;
  int out_stride = 0;
  float scale = 1.0f;
  int window = 0;
};

cudaError_t InitPlainAttention();
cudaError_t PlainAttention(const Launch& launch, const PlainAttentionArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_PLAIN_H_
