#include "coordinator/admission.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "coordinator/kv/block_table.h"
#include "coordinator/retry_delay.h"

namespace lockstep {

absl::Status Admission::Check(const Request& request, uint32_t waiting, uint32_t idle_slots) const {
  absl::Status fits = CheckFits(request);
  if (!fits.ok()) return fits;
  if (waiting < uint64_t{config_.max_queued_requests} + idle_slots) return absl::OkStatus();
  const int seconds = RetryDelaySeconds(waiting);
  absl::Status full = absl::ResourceExhaustedError(
      absl::StrCat("the queue is full: ", waiting, " requests wait (--max-queued-requests is ",
                   config_.max_queued_requests, "); retry in ", seconds, " s"));
  SetRetryDelay(&full, seconds);
  return full;
}

absl::Status Admission::CheckFits(const Request& request) const {
  const uint64_t prompt = request.prompt.size();
  const uint64_t max_tokens = request.sampling.max_tokens;
  if (prompt == 0) return absl::InvalidArgumentError("prompt: at least one token is needed");
  if (request.sampling.n == 0) return absl::InvalidArgumentError("n: must be at least 1");
  if (prompt >= config_.max_model_len) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: ", prompt, " tokens leave no room in max_model_len, which is ",
                     config_.max_model_len));
  }
  if (prompt + max_tokens > config_.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_tokens: prompt of ", prompt, " tokens + max_tokens ", max_tokens, " = ",
        prompt + max_tokens, " exceeds max_model_len, which is ", config_.max_model_len,
        "; at most ", config_.max_model_len - prompt, " would work"));
  }
  const uint64_t positions = prompt + std::max<uint64_t>(max_tokens, 1) - 1;
  const uint32_t blocks = BlocksForTokens(positions, config_.block_size);
  if (blocks > config_.num_kv_blocks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_tokens: prompt of ", prompt, " tokens + max_tokens ", max_tokens, " needs ", blocks,
        " KV blocks of ", config_.block_size, ", the cache has ", config_.num_kv_blocks));
  }
  return absl::OkStatus();
}

void Admission::NoteStarted(int64_t now_ms, uint32_t still_waiting) {
  if (queue_was_busy_) {
    const double interval = static_cast<double>(std::max<int64_t>(0, now_ms - last_departure_ms_));
    departure_interval_ms_ += 0.1 * (interval - departure_interval_ms_);
  }
  last_departure_ms_ = now_ms;
  queue_was_busy_ = still_waiting > 0;
}

int Admission::RetryDelaySeconds(uint32_t waiting) const {
  const double seconds = std::ceil(departure_interval_ms_ * waiting / 2 / 1000);
  return static_cast<int>(std::clamp(seconds, 1.0, 60.0));
}

}  // namespace lockstep
