// The steps a group was sent and has not answered in full, oldest first. A step
// is done when every rank has echoed its plan's digest and all ranks ran the
// same number of collectives; anything else is a lie, found at that step and
// not as a hang later. Pure; one thread.
#ifndef LOCKSTEP_COORDINATOR_GROUP_STEP_LEDGER_H_
#define LOCKSTEP_COORDINATOR_GROUP_STEP_LEDGER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/worker_group.h"
#include "wire/step_plan.h"

namespace lockstep {

class StepLedger {
 public:
  explicit StepLedger(uint32_t tp_size) : tp_size_(tp_size) {}

  struct Step {
    uint64_t step = 0;
    uint64_t digest = 0;
    uint64_t tokens = 0;   // scheduled
    int64_t began_ms = 0;  // sent, or the step before it was done
    uint32_t num_answers = 0;
    std::vector<std::optional<StepResult>> answers;  // by rank
  };

  void Sent(const StepPlan& plan, int64_t now_ms);

  // The answer of `rank`. A value when it completes the oldest step, with that
  // step's tokens and time; an error (Internal, without the rank's name) when
  // the answer contradicts the plan or another rank.
  struct Done {
    GroupStep step;
    uint64_t tokens = 0;
    double milliseconds = 0;
  };
  absl::StatusOr<std::optional<Done>> Answer(uint32_t rank, StepResult result, int64_t now_ms);

  const Step* oldest() const { return steps_.empty() ? nullptr : &steps_.front(); }
  size_t size() const { return steps_.size(); }
  uint64_t last_sent() const { return last_sent_; }
  // Ranks that have not answered the oldest step.
  std::vector<uint32_t> Missing() const;
  // The process stood still: no step is to blame for it.
  void Forgive(int64_t ms);

 private:
  uint32_t tp_size_;
  std::deque<Step> steps_;
  uint64_t last_sent_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_STEP_LEDGER_H_
