// Runs plans: checks each against the slots it knows, hands the deltas and the
// work to the backend through the decoder, and answers with a StepResult.
// Every id in a plan is bounds-checked here: a plan that does not fit the
// slots' state is an error, and nothing of it is applied.
//
// Called by one thread (the session's executor thread).
#ifndef LOCKSTEP_WORKER_STEP_EXECUTOR_H_
#define LOCKSTEP_WORKER_STEP_EXECUTOR_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "wire/step_plan.h"

namespace lockstep {

struct ExecutorLimits {
  uint32_t max_num_seqs = 0;
  uint32_t max_batched_tokens = 0;
  uint32_t max_model_len = 0;
  uint32_t block_size = 16;
  uint32_t num_kv_blocks = 0;
  uint32_t vocab_size = 0;
};

class Decoder;  // worker/decoder.h

class StepExecutor {
 public:
  // `decoder` outlives the executor and has been attached to the epoch's
  // communicator.
  StepExecutor(const ExecutorLimits& limits, uint64_t epoch, Decoder* decoder);
  ~StepExecutor();

  // Enqueues a plan; at most wire::kMaxPlansInFlight are uncollected.
  // plan_received_ns: the monotonic clock when the plan had been read.
  // InvalidArgument: the plan contradicts this worker's state (epoch, step,
  // ids, limits). FailedPrecondition: its digest is not the one of this worker's
  // slots. Aborted / Unavailable: a collective failed; the epoch is over, and
  // every later call fails alike. Internal: the rest.
  absl::Status Submit(const StepPlan& plan, uint64_t plan_received_ns);
  // Of the oldest plan submitted and not collected: whether Collect would return
  // at once; its result, waited for. Errors as Submit's.
  bool Done() const;
  absl::StatusOr<StepResult> Collect();
  // Both, where nothing else is in flight.
  absl::StatusOr<StepResult> Run(const StepPlan& plan, uint64_t plan_received_ns);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_STEP_EXECUTOR_H_
