// The parts of a chat body that a template is rendered from: messages, tools
// and variables. Errors name the field down to the index.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_CHAT_MESSAGES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_CHAT_MESSAGES_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/api/http/json_reader.h"
#include "coordinator/text/chat_template.h"

namespace lockstep {

// Messages of the roles system, user, assistant and tool; developer is system's
// newer name. Content is text or text parts.
absl::StatusOr<std::vector<ChatMessage>> ReadMessages(const Json& list);

// The functions' names; their parameters may be any JSON schema, which is for
// the model to read and is not enforced.
absl::StatusOr<std::vector<std::string>> ReadToolNames(const Json& tools);

// Whether `value` has at most limits::kToolValues values in it, so that it may be
// read once more with its keys in order, and rendered.
absl::Status CheckSize(const Json& value, const char* field);

// Member `field` of the object that `body` is, as JSON text with keys in the
// client's order. The body has been parsed and the member's size checked.
std::string OrderedMember(const std::string& body, const char* field);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_CHAT_MESSAGES_H_
