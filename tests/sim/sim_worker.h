// A worker of one epoch: executes plans in order, against the production
// SlotBook (which refuses a plan that contradicts what came before, including
// its digest) and a pretend KV cache in which each position remembers the whole
// prefix it was computed from. A block reused too early, shared wrongly or
// found in the prefix cache for other tokens is noticed when it is read.
#ifndef LOCKSTEP_TESTS_SIM_SIM_WORKER_H_
#define LOCKSTEP_TESTS_SIM_SIM_WORKER_H_

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/scheduler.h"
#include "wire/step_plan.h"
#include "worker/slot_book.h"

namespace lockstep::sim {

// (seed of a sequence, number of known tokens): sampling there meets NaN.
using PoisonSet = std::set<std::pair<int64_t, uint32_t>>;

class SimWorker {
 public:
  SimWorker(const SchedulerConfig& config, uint64_t epoch, const PoisonSet* poison);

  // The result, or what is wrong with the plan or with the KV that it relied on.
  absl::StatusOr<StepResult> Run(const StepPlan& plan);

 private:
  struct Slot {
    std::vector<TokenId> known;
    std::vector<uint64_t> prefix_hashes;  // of known[0..i]
    uint32_t num_prompt = 0;
    std::vector<BlockId> blocks;
    SlotSampling sampling;
  };

  absl::Status Compute(const BatchSpan& span, Slot* slot, StepResult* result);
  static void Know(Slot* slot, TokenId token);

  const SchedulerConfig config_;
  SlotBook book_;
  std::vector<Slot> slots_;
  std::vector<uint64_t> kv_;  // [num_kv_blocks, block_size]
  const PoisonSet* poison_;
};

}  // namespace lockstep::sim

#endif  // LOCKSTEP_TESTS_SIM_SIM_WORKER_H_
