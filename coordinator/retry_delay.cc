#include "coordinator/retry_delay.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "common/check.h"

namespace lockstep {

void SetRetryDelay(absl::Status* status, int seconds) {
  LOCKSTEP_CHECK(seconds >= 1);
  status->SetPayload(kRetryDelayTypeUrl, absl::Cord(absl::StrCat(seconds)));
}

std::optional<int> GetRetryDelay(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kRetryDelayTypeUrl);
  int seconds = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &seconds) || seconds < 1) return {};
  return seconds;
}

}  // namespace lockstep
