#include "worker/backend/cuda/step_io.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/check.h"

namespace lockstep::cuda {
namespace {

using kernels::kStepRing;

constexpr size_t kStagingBytes = 4 << 20;  // of admissions, a step

}  // namespace

absl::Status StepIo::Allocate(const BackendLimits& limits, int64_t max_logit_rows) {
  const int rows = static_cast<int>(limits.max_batched_tokens);
  // Prompt log-probabilities may ask for every row, in several turns.
  const int logit_rows = std::max(rows, static_cast<int>(max_logit_rows));
  const int seqs = static_cast<int>(limits.max_num_seqs);
  io_.capacity = {.rows = rows,
                  .logit_rows = logit_rows,
                  .spans = seqs + 1,  // one may be cut in two
                  .updates = 2 * seqs + rows / static_cast<int>(limits.block_size) + 64};
  io_.inbox_layout = kernels::MakeInboxLayout(io_.capacity);
  outbox_bytes_ = kernels::OutboxBytes(io_.capacity);
  arrays_.table_stride =
      static_cast<int>((limits.max_model_len + limits.block_size - 1) / limits.block_size);
  const size_t table = static_cast<size_t>(seqs) * arrays_.table_stride;

  absl::Status status = inbox_.AllocatePinned(io_.inbox_layout.bytes * kStepRing, "step plans");
  if (status.ok()) status = inbox_copy_.AllocateZeroed(inbox_.bytes(), "step plans");
  if (status.ok()) status = outbox_.AllocatePinned(outbox_bytes_ * kStepRing, "step results");
  if (status.ok()) status = staging_.AllocatePinned(kStagingBytes * kStepRing, "new sequences");
  if (status.ok()) {
    status =
        words_.AllocateZeroed(2 * size_t(rows) + 3 * size_t(logit_rows) + table, "step arrays");
  }
  if (status.ok()) status = scores_.AllocateZeroed(logit_rows, "step arrays");
  if (status.ok()) status = spans_.AllocateZeroed(io_.capacity.spans, "step arrays");
  if (status.ok())
    status = counters_.AllocateZeroed(3 + sizeof(kernels::CollectiveClock) / sizeof(uint64_t),
                                      "step counters");
  if (!status.ok()) return status;

  io_.inbox = inbox_.device();
  io_.outbox = outbox_.device();
  io_.sequence = counters_.get();
  io_.begin_ns = counters_.get() + 1;
  io_.sampling_begin_ns = counters_.get() + 2;
  io_.collectives = reinterpret_cast<kernels::CollectiveClock*>(counters_.get() + 3);
  int32_t* at = words_.get();
  const auto take = [&at](size_t count) {
    int32_t* begin = at;
    at += count;
    return begin;
  };
  arrays_.slot = take(rows);
  arrays_.position = take(rows);
  arrays_.logit_row = take(logit_rows);
  arrays_.logit_slot = take(logit_rows);
  arrays_.logit_position = take(logit_rows);
  arrays_.logit_scores = scores_.get();
  arrays_.spans = spans_.get();
  arrays_.block_table = take(table);
  return absl::OkStatus();
}

absl::Status StepIo::Reset(cudaStream_t stream) {
  updates_.clear();
  staged_ = 0;
  submitted_ = 0;
  std::memset(outbox_.get(), 0, outbox_.bytes());
  return ToStatus(cudaMemsetAsync(counters_.get(), 0, counters_.bytes(), stream),
                  "clearing step counters");
}

absl::Status StepIo::Upload(cudaStream_t stream, void* to, const void* from, size_t bytes) {
  std::byte* part = staging_.get() + submitted_ % kStepRing * kStagingBytes;
  for (size_t done = 0; done < bytes;) {
    if (staged_ == kStagingBytes) {
      // More than a step's share: what is staged has to be on its way first.
      if (cudaError_t error = cudaStreamSynchronize(stream); error != cudaSuccess) {
        return ToStatus(error, "uploading new sequences");
      }
      staged_ = 0;
    }
    const size_t count = std::min(bytes - done, kStagingBytes - staged_);
    std::memcpy(part + staged_, static_cast<const std::byte*>(from) + done, count);
    const cudaError_t error = cudaMemcpyAsync(static_cast<std::byte*>(to) + done, part + staged_,
                                              count, cudaMemcpyHostToDevice, stream);
    if (error != cudaSuccess) return ToStatus(error, "uploading new sequences");
    done += count;
    staged_ = std::min(kStagingBytes, staged_ + (count + 63) / 64 * 64);
  }
  return absl::OkStatus();
}

absl::Status StepIo::Grow(cudaStream_t stream, Slot slot, uint32_t first,
                          absl::Span<const BlockId> blocks) {
  LOCKSTEP_CHECK(first + blocks.size() <= static_cast<size_t>(arrays_.table_stride));
  if (blocks.size() <= 4 &&
      updates_.size() + blocks.size() <= static_cast<size_t>(io_.capacity.updates)) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      updates_.push_back({static_cast<int32_t>(slot.value), static_cast<int32_t>(first + i),
                          static_cast<int32_t>(blocks[i].value)});
    }
    return absl::OkStatus();
  }
  std::vector<int32_t> ids;
  ids.reserve(blocks.size());
  for (const BlockId block : blocks) ids.push_back(static_cast<int32_t>(block.value));
  return Upload(stream, arrays_.block_table + size_t{slot.value} * arrays_.table_stride + first,
                ids.data(), ids.size() * sizeof(int32_t));
}

void StepIo::Write(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows, int cut) {
  std::byte* entry = inbox_.get() + submitted_ % kStepRing * io_.inbox_layout.bytes;
  const kernels::InboxLayout& layout = io_.inbox_layout;
  auto* slot = reinterpret_cast<int32_t*>(entry + layout.slot);
  auto* position = reinterpret_cast<int32_t*>(entry + layout.position);
  auto* prefill = reinterpret_cast<kernels::PrefillSpan*>(entry + layout.spans);
  kernels::StepHeader header;
  bool decoding = true;
  for (const BatchSpan& span : spans) {
    decoding = decoding && span.count == 1;
    if (!decoding) {
      const int32_t slot_id = static_cast<int32_t>(span.slot.value);
      const int32_t begin = static_cast<int32_t>(span.begin);
      const int32_t count = static_cast<int32_t>(span.count);
      const int32_t before =
          header.rows < cut && header.rows + count > cut ? cut - header.rows : count;
      prefill[header.spans++] = {slot_id, header.rows, begin, before};
      if (before < count) {
        prefill[header.spans++] = {slot_id, header.rows + before, begin + before, count - before};
      }
    }
    for (uint32_t i = 0; i < span.count; ++i) {
      LOCKSTEP_CHECK(header.rows < io_.capacity.rows);
      slot[header.rows] = static_cast<int32_t>(span.slot.value);
      position[header.rows++] = static_cast<int32_t>(span.begin + i);
    }
  }
  auto* logits = reinterpret_cast<kernels::LogitRowInput*>(entry + layout.logit_rows);
  for (const LogitRow& row : rows) {
    logits[header.logit_rows++] = {static_cast<int32_t>(row.row), slot[row.row], position[row.row],
                                   row.samples ? 0 : 1};
  }
  std::memcpy(entry + layout.updates, updates_.data(),
              updates_.size() * sizeof(kernels::TableUpdate));
  header.updates = static_cast<int32_t>(updates_.size());
  updates_.clear();
  staged_ = 0;
  std::memcpy(entry, &header, sizeof(header));
  std::atomic_thread_fence(std::memory_order_release);
}

absl::Status StepIo::CopyInbox(cudaStream_t stream, kernels::StepIo* io) {
  *io = io_;
  io->inbox = inbox_copy_.get();
  const size_t at = submitted_ % kStepRing * io_.inbox_layout.bytes;
  return ToStatus(cudaMemcpyAsync(inbox_copy_.get() + at, inbox_.get() + at, io_.inbox_layout.bytes,
                                  cudaMemcpyHostToDevice, stream),
                  "uploading a step's plan");
}

std::byte* StepIo::outbox_entry(uint64_t step) const {
  return outbox_.get() + (step - 1) % kStepRing * outbox_bytes_;
}

bool StepIo::IsDone(uint64_t step) const {
  const auto* sequence = reinterpret_cast<const volatile uint64_t*>(&stamp(step).sequence);
  if (*sequence != step) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

const kernels::StepStamp& StepIo::stamp(uint64_t step) const {
  return *reinterpret_cast<const kernels::StepStamp*>(outbox_entry(step));
}

const kernels::SampledRow* StepIo::results(uint64_t step) const {
  return reinterpret_cast<const kernels::SampledRow*>(outbox_entry(step) +
                                                      sizeof(kernels::StepStamp));
}

const kernels::RowLogprobs* StepIo::logprobs(uint64_t step) const {
  return reinterpret_cast<const kernels::RowLogprobs*>(results(step) + io_.capacity.logit_rows);
}

kernels::StepRows StepIo::rows(int first) const {
  return {.slot = arrays_.slot + first,
          .position = arrays_.position + first,
          .block_table = arrays_.block_table,
          .table_stride = arrays_.table_stride};
}

}  // namespace lockstep::cuda
