#include "coordinator/group/step_deadline.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace lockstep {
namespace {
// A single slow step is forgotten to a third after this many quicker ones.
constexpr double kMemorySteps = 500.0;
}  // namespace

int StepDeadline::Bucket(uint64_t tokens) {
  return std::min(static_cast<int>(std::bit_width(tokens)), kBuckets - 1);
}

void StepDeadline::Observe(uint64_t tokens, double milliseconds) {
  double& slow = slow_ms_[static_cast<size_t>(Bucket(tokens))];
  slow = std::max(milliseconds, slow * (1.0 - 1.0 / kMemorySteps));
}

// The cost of a step grows at most linearly with its tokens from a smaller one,
// and a larger one bounds it from above. 0: nothing is known.
double StepDeadline::Estimate(int bucket) const {
  for (int b = bucket; b >= 0; --b) {
    const double slow = slow_ms_[static_cast<size_t>(b)];
    if (slow > 0) return std::ldexp(slow, bucket - b);
  }
  for (int b = bucket + 1; b < kBuckets; ++b) {
    const double slow = slow_ms_[static_cast<size_t>(b)];
    if (slow > 0) return slow;
  }
  return 0;
}

int64_t StepDeadline::AllowanceMs(uint64_t tokens) const {
  const double estimate = Estimate(Bucket(tokens));
  const double allowance = estimate > 0
                               ? options_.factor * estimate
                               : static_cast<double>(options_.first_step_ms) +
                                     options_.first_step_ms_per_token * static_cast<double>(tokens);
  // A day bounds what a wild measurement could do to the arithmetic.
  constexpr double kDayMs = 24.0 * 3600 * 1000;
  return std::max(options_.floor_ms, static_cast<int64_t>(std::min(allowance, kDayMs)));
}

}  // namespace lockstep
