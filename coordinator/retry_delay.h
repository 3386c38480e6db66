// How long a refused client should wait, carried inside the status that refuses
// it, so that every protocol can say it in its own way (Retry-After, RetryInfo).
//
//   absl::Status full = absl::ResourceExhaustedError("the queue is full");
//   SetRetryDelay(&full, 3);
//   GetRetryDelay(full);  // 3
//
// Carried as a status payload: type url "lockstep/retry-delay-seconds", value
// the number in decimal digits.
#ifndef LOCKSTEP_COORDINATOR_RETRY_DELAY_H_
#define LOCKSTEP_COORDINATOR_RETRY_DELAY_H_

#include <optional>

#include "absl/status/status.h"

namespace lockstep {

inline constexpr char kRetryDelayTypeUrl[] = "lockstep/retry-delay-seconds";

// seconds >= 1. No effect on an OK status.
void SetRetryDelay(absl::Status* status, int seconds);
// Nothing where there is no delay, or none that makes sense.
std::optional<int> GetRetryDelay(const absl::Status& status);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_RETRY_DELAY_H_
