// The body of POST /v1/completions, read into door-neutral requests (one a
// prompt) and into what only this door does with their answers. A chat body
// (chat_request.h) becomes the same.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_REQUEST_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_REQUEST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/json_reader.h"

namespace lockstep {

struct CompletionRequest {
  std::vector<ClientRequest> prompts;
  uint32_t n = 1;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage_stats = false;
  bool echo = false;
  bool logprobs = false;         // of generated tokens, and of the prompt with echo
  bool prompt_logprobs = false;  // as a field of their own
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;
  std::vector<std::string> tools;  // functions that an answer's calls may name; of a chat
};

// Errors name the field; an unknown one is an error. Values are checked by
// BuildRequest, except what concerns the batch.
absl::StatusOr<CompletionRequest> ReadCompletionRequest(const std::string& body);

// The fields that both bodies have, read out of `fields`.
void ReadCommon(FieldReader* fields, ClientRequest* client, CompletionRequest* out);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_REQUEST_H_
