#include "coordinator/api/api_error.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "common/log.h"
#include "coordinator/api/limits.h"
#include "coordinator/retry_delay.h"

namespace lockstep {
namespace {

absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }

}  // namespace

absl::Status FieldError(std::string_view field, std::string_view what) {
  return WithField(absl::InvalidArgumentError(absl::StrCat(ToAbsl(field), ": ", ToAbsl(what))),
                   field);
}

absl::Status WithField(absl::Status status, std::string_view field) {
  status.SetPayload(kFieldTypeUrl, absl::Cord(ToAbsl(field)));
  return status;
}

std::string ErrorField(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kFieldTypeUrl);
  return payload ? std::string(*payload) : std::string();
}

absl::Status UnknownModelError(std::string_view asked, std::string_view served) {
  return WithField(
      absl::NotFoundError(absl::StrCat("model: '", Echo(asked), "' is not served here; there is '",
                                       ToAbsl(served), "'")),
      "model");
}

absl::Status RefusalOf(const EngineInfo& info) {
  switch (info.state) {
    case EngineState::kReady:
    case EngineState::kRecovering:
      return absl::OkStatus();
    case EngineState::kLoading:
      return absl::UnavailableError("the model is loading");
    case EngineState::kDraining:
      return absl::UnavailableError("the server is draining");
    case EngineState::kFailed:
      break;
  }
  return absl::UnavailableError(absl::StrCat("the server has failed: ", info.failure.message()));
}

std::optional<int> RetrySeconds(const absl::Status& status) {
  if (status.code() != absl::StatusCode::kResourceExhausted &&
      status.code() != absl::StatusCode::kUnavailable) {
    return {};
  }
  return GetRetryDelay(status).value_or(1);
}

std::string Echo(std::string_view value) { return OneLine(value, limits::kEchoedCharacters); }

absl::Status CheckIdentifier(std::string_view field, std::string_view value) {
  if (value.size() > limits::kIdentifierBytes) {
    return FieldError(
        field,
        absl::StrCat(value.size(), " bytes are too many; allowed: ", limits::kIdentifierBytes));
  }
  const auto printable = [](char c) { return c >= 0x20 && c <= 0x7e; };
  if (!std::all_of(value.begin(), value.end(), printable)) {
    return FieldError(field, absl::StrCat("'", Echo(value), "' is not printable ASCII"));
  }
  return absl::OkStatus();
}

}  // namespace lockstep
