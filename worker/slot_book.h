// A worker's own books of the slots: which are live, how many tokens of each are
// known and computed, which blocks it owns. Made from plans alone, so it says
// what the coordinator should believe too: the plan's digest is checked against
// it. Every id of a plan is checked here, before anything uses it.
//
//   auto spans = book.Check(plan);   // InvalidArgument: nothing has changed
//   book.Apply(plan, *spans);        // finished, new, grown, then computed
#ifndef LOCKSTEP_WORKER_SLOT_BOOK_H_
#define LOCKSTEP_WORKER_SLOT_BOOK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "wire/step_plan.h"
#include "worker/batch.h"
#include "worker/step_executor.h"

namespace lockstep {

class SlotBook {
 public:
  SlotBook(const ExecutorLimits& limits, uint64_t epoch);

  // The plan's spans, resolved. InvalidArgument: the plan does not fit the
  // limits or the slots' state. FailedPrecondition: its digest is another.
  absl::StatusOr<std::vector<BatchSpan>> Check(const StepPlan& plan) const;

  // `plan` and `spans` as Check passed and returned them.
  void Apply(const StepPlan& plan, const std::vector<BatchSpan>& spans);

  uint64_t last_step() const { return last_step_; }

 private:
  struct SlotState {
    bool live = false;
    uint32_t known = 0;
    uint32_t computed = 0;
    std::vector<BlockId> table;
  };
  class Draft;  // a plan's changes, not yet made

  const ExecutorLimits limits_;
  const uint64_t epoch_;
  uint64_t last_step_ = 0;
  std::vector<SlotState> slots_;
  std::vector<uint32_t> block_uses_;  // tables that hold the block
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_SLOT_BOOK_H_
