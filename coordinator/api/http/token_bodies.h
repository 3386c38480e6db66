// The bodies of POST /tokenize and /detokenize, from text to text.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_TOKEN_BODIES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_TOKEN_BODIES_H_

#include <string>

#include "absl/status/statusor.h"
#include "coordinator/api/served_model.h"

namespace lockstep {

// {prompt | messages, add_special_tokens, add_generation_prompt, model} ->
// {count, max_model_len, tokens}
absl::StatusOr<std::string> TokenizeBody(const std::string& body, const ServedModel& model);

// {tokens, model} -> {prompt}, special tokens kept
absl::StatusOr<std::string> DetokenizeBody(const std::string& body, const ServedModel& model);

// What a client needs to count and frame tokens by itself: the special tokens,
// the chat template, the sizes.
std::string TokenizerInfoBody(const ServedModel& model);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_TOKEN_BODIES_H_
