// What the doors add to a status: the field at fault, carried as a payload, and
// the wait that a refusal asks for.
//
//   return FieldError("temperature", "3 is above 2; allowed: [0, 2]");
//     -> InvalidArgument "temperature: 3 is above 2; allowed: [0, 2]"
//   ErrorField(status) -> "temperature"
#ifndef LOCKSTEP_COORDINATOR_API_API_ERROR_H_
#define LOCKSTEP_COORDINATOR_API_API_ERROR_H_

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "coordinator/engine_client.h"

namespace lockstep {

inline constexpr char kFieldTypeUrl[] = "lockstep/field";

absl::Status FieldError(std::string_view field, std::string_view what);
// Names the field in a status made elsewhere; the message is left alone.
absl::Status WithField(absl::Status status, std::string_view field);
std::string ErrorField(const absl::Status& status);  // "" when none is named

// Another model's name: NotFound, field "model".
absl::Status UnknownModelError(std::string_view asked, std::string_view served);
// Unavailable in the words of the state, for work that comes at the wrong time;
// OK in kReady and kRecovering.
absl::Status RefusalOf(const EngineInfo& info);

// Whole seconds that a RESOURCE_EXHAUSTED or UNAVAILABLE status asks to wait:
// what the refuser said, else 1. Nothing for other codes.
std::optional<int> RetrySeconds(const absl::Status& status);

// A client's value in an error message: at most 64 characters, control
// characters escaped, "..." where it was cut.
std::string Echo(std::string_view value);

// Bytes of printable ASCII, at most limits::kIdentifierBytes.
absl::Status CheckIdentifier(std::string_view field, std::string_view value);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_API_ERROR_H_
