// Statuses as OpenAI's clients read them:
//   {"error": {"message", "type", "param", "code"}}
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_HTTP_ERROR_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_HTTP_ERROR_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "coordinator/api/http/exchange.h"

namespace lockstep {

int HttpCode(const absl::Status& status);

// The error object alone, for the end of a stream that had begun.
std::string ErrorJson(int code, std::string_view message, std::string_view param);
std::string ErrorJson(const absl::Status& status);

// With Retry-After for 429 and 503.
HttpReply ErrorReply(const absl::Status& status);
// For what has no status of ours: 404, 405, 413, 415, 431 ...
HttpReply ErrorReply(int code, std::string_view message, std::string_view param = {});

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_HTTP_ERROR_H_
