// A generation request as a client asked for it, whatever door it came through:
// optional means "not said". BuildRequest turns it into what the engine takes,
// or refuses it naming the field.
//
// Numbers are as wide as a client can write them, so that a value out of range
// is refused by its limit and not by a conversion.
#ifndef LOCKSTEP_COORDINATOR_API_CLIENT_REQUEST_H_
#define LOCKSTEP_COORDINATOR_API_CLIENT_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/api/served_model.h"
#include "coordinator/request.h"
#include "coordinator/text/chat_template.h"

namespace lockstep {

struct ClientSampling {
  std::optional<int64_t> max_tokens;
  std::optional<double> temperature, top_p, min_p;
  std::optional<int64_t> top_k;
  std::optional<double> repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int64_t> seed;
  std::vector<std::pair<int64_t, double>> logit_bias;
  std::vector<std::string> stop;
  std::vector<int64_t> stop_token_ids;
  std::optional<int64_t> min_tokens, n, logprobs, prompt_logprobs;
  std::optional<bool> ignore_eos, include_stop_str_in_output, skip_special_tokens;
  // As the client named what has two names.
  const char* max_tokens_field = "max_tokens";
  const char* logprobs_field = "logprobs";
};

struct ChatPrompt {
  std::vector<ChatMessage> messages;
  ChatContext context = {};
};

struct ClientRequest {
  std::variant<std::monostate, std::string, std::vector<TokenId>, ChatPrompt> prompt;
  std::optional<bool> add_special_tokens;  // default: true for text, false for chat
  ClientSampling sampling;
  std::string request_id;  // "" : the server gives one
  int32_t priority = 0;
  std::string model;                  // "" : the served one
  int64_t deadline_ms = kNoDeadline;  // on the engine's clock
  uint64_t cache_salt = 0;            // of the caller's API key
};

// How the doors differ, and nothing else does.
struct DoorDefaults {
  // Absent: what is left of max_model_len.
  std::optional<uint32_t> max_tokens;
  // How this door names the prompt and its token-id form in errors.
  const char* prompt_field = "prompt";
};

// The whole request path up to the engine: limits, tokens, context length,
// ending ids. May tokenise a long text: not for a thread that serves others.
// InvalidArgument with the field (ErrorField), or NotFound for another model.
absl::StatusOr<Request> BuildRequest(const ClientRequest& client, const ServedModel& model,
                                     const DoorDefaults& defaults, int64_t now_ms);

// The token ids of a prompt, for BuildRequest and the Tokenize calls. A text of
// clearly more than `max_tokens` is InvalidArgument.
absl::StatusOr<std::vector<TokenId>> EncodePrompt(const ClientRequest& client,
                                                  const ServedModel& model,
                                                  const char* prompt_field, size_t max_tokens);
// What the Tokenize calls take: more than any prompt that could be served. And
// what the Detokenize calls take, of which a door may ask before it reads the ids.
size_t TokenizeLimit(const ServedModel& model);
absl::Status CheckDetokenize(size_t tokens, const ServedModel& model, const char* field);

// The text of ids as a whole text, special tokens kept; InvalidArgument for too
// many or for an id outside the vocabulary.
absl::StatusOr<std::string> DecodeTokens(const std::vector<TokenId>& ids, const ServedModel& model,
                                         const char* field);

// Limits of `sampling` alone: no model, no prompt.
absl::StatusOr<SamplingParams> BuildSampling(const ClientSampling& sampling, uint32_t vocab_size);

// "" or the served name; NotFound otherwise.
absl::Status CheckModel(std::string_view asked, const ServedModel& model);

// A fresh id for a request whose client gave none: 32 hexadecimal digits.
std::string MakeRequestId();

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_CLIENT_REQUEST_H_
