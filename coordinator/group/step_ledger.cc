#include "coordinator/group/step_ledger.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/check.h"

namespace lockstep {

void StepLedger::Sent(const StepPlan& plan, int64_t now_ms) {
  LOCKSTEP_CHECK(plan.step == last_sent_ + 1);
  last_sent_ = plan.step;
  Step step;
  step.step = plan.step;
  step.digest = plan.digest;
  for (const Span& span : plan.spans) step.tokens += span.num_tokens;
  step.began_ms = now_ms;
  step.answers.resize(tp_size_);
  steps_.push_back(std::move(step));
}

absl::StatusOr<std::optional<StepLedger::Done>> StepLedger::Answer(uint32_t rank, StepResult result,
                                                                   int64_t now_ms) {
  // A rank answers in order: its next step is the oldest it has not answered.
  const auto it = std::find_if(steps_.begin(), steps_.end(),
                               [rank](const Step& s) { return !s.answers[rank].has_value(); });
  if (it == steps_.end()) {
    return absl::InternalError(
        absl::StrCat("answered step ", result.step, ", which was not sent or is already answered"));
  }
  if (result.step != it->step) {
    return absl::InternalError(
        absl::StrCat("answered step ", result.step, " where step ", it->step, " was due"));
  }
  if (result.digest != it->digest) {
    return absl::InternalError(
        absl::StrFormat("its state differs from the plan at step %d: digest %016x, planned %016x",
                        it->step, result.digest, it->digest));
  }
  for (uint32_t other = 0; other < tp_size_; ++other) {
    const std::optional<StepResult>& answer = it->answers[other];
    if (answer && answer->num_collectives != result.num_collectives) {
      return absl::InternalError(absl::StrCat("ran ", result.num_collectives,
                                              " collectives in step ", it->step, " where rank ",
                                              other, " ran ", answer->num_collectives));
    }
  }
  it->answers[rank] = std::move(result);
  if (++it->num_answers < tp_size_) return std::nullopt;

  // In-order answers complete steps in order.
  LOCKSTEP_CHECK(it == steps_.begin());
  Done done;
  done.tokens = it->tokens;
  done.milliseconds = static_cast<double>(now_ms - it->began_ms);
  for (const auto& answer : it->answers) done.step.timings.push_back(answer->timing);
  done.step.result = *std::move(it->answers[0]);
  steps_.pop_front();
  if (!steps_.empty()) steps_.front().began_ms = std::max(steps_.front().began_ms, now_ms);
  return done;
}

std::vector<uint32_t> StepLedger::Missing() const {
  std::vector<uint32_t> missing;
  if (steps_.empty()) return missing;
  for (uint32_t rank = 0; rank < tp_size_; ++rank) {
    if (!steps_.front().answers[rank]) missing.push_back(rank);
  }
  return missing;
}

void StepLedger::Forgive(int64_t ms) {
  for (Step& step : steps_) step.began_ms += ms;
}

}  // namespace lockstep
