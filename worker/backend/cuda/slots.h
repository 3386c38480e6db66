// What the cuda backend keeps of each slot: on the device its tokens and how it
// samples, on the host what decides how a step is run.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_SLOTS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_SLOTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/sample.h"
#include "model/shard_plan.h"
#include "wire/step_plan.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/backend/cuda/step_io.h"

namespace lockstep::cuda {

class Slots {
 public:
  struct State {
    bool live = false;
    uint32_t num_blocks = 0;
    kernels::SlotParams params;
    kernels::SampleNeeds needs;  // of its sampled rows
  };

  absl::Status Allocate(const BackendLimits& limits, const ModelConfig& config,
                        const ShardPlan& plan);
  absl::Status Reset(cudaStream_t stream);
  absl::Status Admit(cudaStream_t stream, const NewSequence& sequence, StepIo* io);
  absl::Status Grow(cudaStream_t stream, Slot slot, absl::Span<const BlockId> blocks, StepIo* io);
  void Release(Slot slot);
  const State& At(Slot slot) const;

  const int32_t* tokens() const { return tokens_.get(); }
  int tokens_stride() const { return tokens_stride_; }
  // Fills in what is kept by slot.
  void Describe(kernels::SampleArgs* args) const;

 private:
  int columns_ = 0, first_vocab_ = 0;  // of this rank's vocabulary
  int tokens_stride_ = 0;
  int64_t counts_stride_ = 0;
  std::vector<State> states_;
  Buffer<int32_t> tokens_;  // [slots][tokens_stride]
  Buffer<kernels::SlotParams> params_;
  Buffer<int32_t> bias_ids_, ending_ids_;
  Buffer<float> bias_values_;
  Buffer<uint16_t> counts_;
  Buffer<uint32_t> poisoned_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_SLOTS_H_
