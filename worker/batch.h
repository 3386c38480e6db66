// What the executor, the decoder and a backend say to each other about one step.
#ifndef LOCKSTEP_WORKER_BATCH_H_
#define LOCKSTEP_WORKER_BATCH_H_

#include <cstdint>
#include <vector>

#include "common/ids.h"
#include "wire/step_plan.h"
#include "worker/comm/communicator.h"

namespace lockstep {

// One span of a step, resolved against the slot's state by the executor. The
// spans' tokens are the step's rows, concatenated in span order.
struct BatchSpan {
  Slot slot;
  uint32_t begin = 0;  // position of the first token
  uint32_t count = 0;
  bool samples = false;  // reaches the last known token
};

// A row of a step whose logits are wanted.
struct LogitRow {
  uint32_t row = 0;   // of the step
  uint32_t span = 0;  // that the row belongs to
  // Samples the slot's next token; otherwise scores the known next token.
  bool samples = false;
};

struct StepOutput {
  std::vector<SampledToken> sampled;                // rank 0
  std::vector<SlotPromptLogprobs> prompt_logprobs;  // rank 0
  CollectiveStats collectives;
  uint64_t sampling_ns = 0;
  uint64_t device_ns = 0;       // from the step's first operation to its last; 0: not measured
  uint64_t device_idle_ns = 0;  // before the first operation, since the last step's end
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_BATCH_H_
