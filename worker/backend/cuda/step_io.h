// The host's side of kernels/step.h: the rings in mapped memory, the uploads that
// admissions need, and what is known of each step until it is collected.
//
// Not thread-safe. Between two steps the order is Admit / Grow -> Begin -> Submitted.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_STEP_IO_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_STEP_IO_H_

#include <cstdint>
#include <deque>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/step.h"
#include "wire/step_plan.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/batch.h"

namespace lockstep::cuda {

class StepIo {
 public:
  // table_stride: blocks of a sequence.
  absl::Status Allocate(const BackendLimits& limits, int64_t max_logit_rows);

  // An epoch begins: nothing is in flight on `stream`.
  absl::Status Reset(cudaStream_t stream);

  // Copies that the next step needs, in the order of the stream.
  absl::Status Upload(cudaStream_t stream, void* to, const void* from, size_t bytes);
  absl::Status Grow(cudaStream_t stream, Slot slot, uint32_t first,
                    absl::Span<const BlockId> blocks);

  // Writes the next step's inbox entry. The first spans of one row each are the
  // decode kernel's; from the first longer one on they are the prefill kernel's, one that row `cut`
  // is in the midst of as two.
  void Write(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows, int cut);

  // For a step of many rows: its entry copied to the device first, which reads mapped
  // memory slowly. *io: where PrepareStep then finds it.
  absl::Status CopyInbox(cudaStream_t stream, kernels::StepIo* io);

  // The step is enqueued; its number.
  uint64_t Submitted() { return ++submitted_; }
  bool IsDone(uint64_t step) const;
  // Of a step that is done: its entry, until kStepRing - 1 steps later.
  const kernels::StepStamp& stamp(uint64_t step) const;
  const kernels::SampledRow* results(uint64_t step) const;
  const kernels::RowLogprobs* logprobs(uint64_t step) const;

  const kernels::StepIo& io() const { return io_; }
  const kernels::StepArrays& arrays() const { return arrays_; }
  kernels::StepRows rows(int first = 0) const;

 private:
  std::byte* outbox_entry(uint64_t step) const;

  kernels::StepIo io_;
  kernels::StepArrays arrays_;
  size_t outbox_bytes_ = 0;
  uint64_t submitted_ = 0;
  std::vector<kernels::TableUpdate> updates_;
  size_t staged_ = 0;  // bytes of this step's staging in use

  Buffer<std::byte> inbox_, outbox_;  // pinned
  Buffer<std::byte> staging_;         // pinned, kStepRing parts
  Buffer<std::byte> inbox_copy_;      // on the device, of inbox_
  Buffer<int32_t> words_;             // the arrays that are int32
  Buffer<uint8_t> scores_;
  Buffer<kernels::PrefillSpan> spans_;
  Buffer<uint64_t> counters_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_STEP_IO_H_
