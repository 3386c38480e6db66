// The phases of kernels/sample.h with what they need around them: the logits of
// one turn, the exchanges between the ranks, the results of a step.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_SAMPLING_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_SAMPLING_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/sample.h"
#include "model/shard_plan.h"
#include "worker/backend/cuda/collectives.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/batch.h"

namespace lockstep::cuda {

// Rows whose logits are made at once; of model/memory_model's.
inline constexpr int64_t kMaxLogitRows = 1024;

class Sampling {
 public:
  // turn_rows: of one Run; step_rows: of all of a step.
  absl::Status Allocate(const ShardPlan& plan, int64_t turn_rows, int64_t step_rows);
  absl::Status Reset(cudaStream_t stream);

  float* logits() { return logits_.get(); }  // [turn_rows][logits_stride]
  int64_t logits_stride() const { return logits_stride_; }
  const kernels::SampledRow* results() const { return results_.get(); }
  const kernels::RowLogprobs* logprobs() const { return logprobs_.get(); }

  // args: needs, rows, slot, position, scores and what is kept by slot. Results go
  // to row `first` of the step's on.
  absl::Status Run(const kernels::Launch& launch, kernels::SampleArgs args, int first,
                   Collectives* collectives);

 private:
  int rank_ = 0, tp_size_ = 1;
  int64_t logits_stride_ = 0;
  Buffer<float> logits_;
  Buffer<std::byte> send_[kernels::kNumSamplePhases], gathered_[kernels::kNumSamplePhases];
  Buffer<std::byte> workspace_;
  Buffer<kernels::SampledRow> results_;
  Buffer<kernels::RowLogprobs> logprobs_;
};

// Adds what a row came to: a sampled token, or the score of a prompt's token.
void AppendResult(const LogitRow& row, Slot slot, uint32_t position,
                  const kernels::SampledRow& result, const kernels::RowLogprobs& logprobs,
                  StepOutput* output);

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_SAMPLING_H_
