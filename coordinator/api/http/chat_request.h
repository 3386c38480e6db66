// The body of POST /v1/chat/completions, read into the same values as that of
// /v1/completions, so that what follows is one path.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_CHAT_REQUEST_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_CHAT_REQUEST_H_

#include <string>

#include "absl/status/statusor.h"
#include "coordinator/api/http/completion_request.h"

namespace lockstep {

// Errors name the field; an unknown one is an error.
absl::StatusOr<CompletionRequest> ReadChatRequest(const std::string& body);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_CHAT_REQUEST_H_
