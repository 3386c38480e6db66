// Keys and values of one byte, in 16 bits for as long as prompts attend to them: the
// kernel for long prompts takes them so (kernels/attention_prefill_widen.h).
#include "model/memory_model.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {

absl::Status CudaBackend::AllocateWidened() {
  kernels::PrefillAttentionArgs args;
  args.type = type_;
  args.kv = Kv(0);
  args.heads = static_cast<int>(plan_.local_heads);
  args.q_stride = qkv_width_;
  args.out_stride = q_width_;
  if (!kernels::PrefillAttentionWidens(args)) return absl::OkStatus();
  const int64_t block_size = limits_.block_size;
  wide_blocks_ = static_cast<int>(
      (WidenedKvTokens(limits_.max_model_len, limits_.max_batched_tokens) + block_size - 1) /
      block_size);
  absl::Status status = wide_kv_.AllocateZeroed(
      size_t{2} * wide_blocks_ * block_size * kv_width_ * kernels::TypeBytes(type_),
      "keys and values in 16 bits");
  if (!status.ok()) return status;
  return wide_table_.AllocateZeroed(size_t{limits_.max_num_seqs} * io_.arrays().table_stride,
                                    "keys and values in 16 bits");
}

int CudaBackend::SpanBlocks(int s) const {
  const int block_size = static_cast<int>(limits_.block_size);
  return (span_ends_[s] + block_size - 1) / block_size;
}

// As many as fit, and one alone that is too long without the room: which kernel takes a
// span depends on that span.
int CudaBackend::WidenedSpans(int first, int end, kernels::PrefillScratch* scratch) const {
  *scratch = {};
  if (wide_blocks_ == 0) return end - first;
  if (SpanBlocks(first) > wide_blocks_) return 1;
  int next = first, blocks = 0;
  while (next < end && blocks + SpanBlocks(next) <= wide_blocks_) blocks += SpanBlocks(next++);
  *scratch = {.k = wide_kv_.get(),
              .v = wide_kv_.get() + wide_kv_.bytes() / 2,
              .block_table = wide_table_.get(),
              .blocks = blocks};
  return next - first;
}

}  // namespace lockstep::cuda
