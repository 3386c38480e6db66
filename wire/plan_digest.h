// A digest of the state a plan schedules, computed twice: by the scheduler from
// its books, by each worker from its own slots. Equal digests mean both agree
// on which slots run, from which position, with how many blocks.
//
//   PlanDigest d(epoch, step);
//   for each span, in order: d.Add(slot, num_computed_before, num_tokens, table_length, samples);
//   plan.digest = d.value();
#ifndef LOCKSTEP_WIRE_PLAN_DIGEST_H_
#define LOCKSTEP_WIRE_PLAN_DIGEST_H_

#include <cstdint>

#include "common/ids.h"

namespace lockstep {

class PlanDigest {
 public:
  PlanDigest(uint64_t epoch, uint64_t step) {
    Mix(epoch);
    Mix(step);
  }

  // table_length: blocks in the slot's table, counted after this plan's growth.
  // samples: whether the span reaches the last known token.
  void Add(Slot slot, uint32_t num_computed, uint32_t num_tokens, uint32_t table_length,
           bool samples) {
    Mix(slot.value);
    Mix((uint64_t{num_computed} << 32) | num_tokens);
    Mix((uint64_t{table_length} << 1) | (samples ? 1 : 0));
  }

  uint64_t value() const { return state_; }

 private:
  // The finaliser of splitmix64 (Steele, Lea, Flood 2014) over a running state.
  void Mix(uint64_t word) {
    uint64_t z = state_ + word + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    state_ = z ^ (z >> 31);
  }

  uint64_t state_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WIRE_PLAN_DIGEST_H_
