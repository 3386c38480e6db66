// The forward pass of every family, readable top to bottom, over the backend
// seam. One Decoder per configured worker: weights of one rank, a KV cache, a
// communicator. It survives an epoch's end: Attach gives it the next
// communicator and an empty KV cache without loading weights again.
#ifndef LOCKSTEP_WORKER_DECODER_H_
#define LOCKSTEP_WORKER_DECODER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "wire/step_plan.h"
#include "worker/comm/communicator.h"

namespace lockstep {

class Backend;  // worker/backend/backend.h

// One span of a step, resolved against the slot's state by the executor.
struct BatchSpan {
  Slot slot;
  uint32_t begin = 0;       // position of the first token
  uint32_t count = 0;
  bool samples = false;     // reaches the last known token
};

struct StepOutput {
  std::vector<SampledToken> sampled;                 // rank 0
  std::vector<SlotPromptLogprobs> prompt_logprobs;   // rank 0
  CollectiveStats collectives;
  uint64_t sampling_ns = 0;
};

class Decoder {
 public:
  Decoder(const ModelConfig& config, const ShardPlan& plan, std::unique_ptr<Backend> backend);
  ~Decoder();

  // A new epoch: an empty KV cache and no slots. `comm` outlives the epoch.
  absl::Status Attach(Communicator* comm);

  // Slot deltas; the executor has checked every id.
  absl::Status Admit(const NewSequence& sequence);
  void Grow(Slot slot, absl::Span<const BlockId> blocks);
  void Release(Slot slot);

  // Computes the spans. Sampled tokens become known to the backend at once, so
  // that the next step may consume them.
  absl::StatusOr<StepOutput> Step(absl::Span<const BatchSpan> spans);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_DECODER_H_
