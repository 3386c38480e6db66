// The forward pass of every family, readable top to bottom, over the backend
// seam. One Decoder per configured worker: weights of one rank, a KV cache, a
// communicator. It survives an epoch's end: Attach gives it the next
// communicator and an empty KV cache without loading weights again.
//
// Not thread-safe: called by the session's executor thread.
#ifndef LOCKSTEP_WORKER_DECODER_H_
#define LOCKSTEP_WORKER_DECODER_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "wire/step_plan.h"
#include "worker/batch.h"
#include "worker/comm/communicator.h"

namespace lockstep {

class Backend;  // worker/backend/backend.h

class Decoder {
 public:
  Decoder(const ModelConfig& config, const ShardPlan& plan, std::unique_ptr<Backend> backend);
  ~Decoder();

  // A new epoch: an empty KV cache and no slots. `comm` outlives the epoch.
  // InvalidArgument when it is not of the shard plan's group.
  absl::Status Attach(Communicator* comm);

  // Slot deltas; the executor has checked every id.
  absl::Status Admit(const NewSequence& sequence);
  void Grow(Slot slot, absl::Span<const BlockId> blocks);
  void Release(Slot slot);

  // Enqueues one step. Sampled tokens become known to the backend in its course,
  // so that the next step may consume them. After an error, here or in Collect,
  // the epoch is over: nothing but Drain and Attach may be called.
  absl::Status Submit(absl::Span<const BatchSpan> spans);
  // As Backend's, of the oldest step not collected.
  bool Done();
  absl::StatusOr<StepOutput> Collect();
  bool Drain();

  const Backend& backend() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_DECODER_H_
