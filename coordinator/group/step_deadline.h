// How long a step may take before its group counts as hung: a multiple of what
// steps like it were measured to take, never below a floor. Pure; one thread.
//
// Steps are grouped by the power of two of their token count. Each group keeps
// a slowly falling maximum of its measured times, which stands in for a high
// percentile; a group without measurements borrows its neighbours', scaled.
// Before anything was measured, the allowance comes from the work itself: a
// first prefill of a big model on a slow machine is slow without being hung.
#ifndef LOCKSTEP_COORDINATOR_GROUP_STEP_DEADLINE_H_
#define LOCKSTEP_COORDINATOR_GROUP_STEP_DEADLINE_H_

#include <array>
#include <cstdint>

namespace lockstep {

struct StepDeadlineOptions {
  int64_t floor_ms = 3'000;
  double factor = 20.0;
  // Until there are measurements: this, and this much for each token.
  int64_t first_step_ms = 5'000;
  double first_step_ms_per_token = 1.0;
};

class StepDeadline {
 public:
  explicit StepDeadline(const StepDeadlineOptions& options) : options_(options) {}

  void Observe(uint64_t tokens, double milliseconds);
  int64_t AllowanceMs(uint64_t tokens) const;

 private:
  static constexpr int kBuckets = 32;  // bucket b: [2^(b-1), 2^b) tokens; 0: none
  static int Bucket(uint64_t tokens);
  double Estimate(int bucket) const;

  StepDeadlineOptions options_;
  std::array<double, kBuckets> slow_ms_{};  // 0: nothing measured
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_STEP_DEADLINE_H_
