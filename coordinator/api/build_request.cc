// From a client's request to the engine's: prompt, context length, ending ids.
#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/bounded_encode.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/limits.h"
#include "coordinator/text/utf8.h"

namespace lockstep {
namespace {

// The message of a library's status, under the field's name.
absl::Status AsFieldError(std::string_view field, const absl::Status& status) {
  return FieldError(field, std::string(status.message()));
}

absl::StatusOr<std::vector<TokenId>> EncodeText(const std::string& text, bool add_special_tokens,
                                                const ServedModel& model, const char* field,
                                                size_t max_tokens) {
  if (!IsValidUtf8(text)) return FieldError(field, "not UTF-8");
  absl::StatusOr<std::vector<TokenId>> ids =
      BoundedEncode(*model.tokenizer, text, add_special_tokens, max_tokens);
  if (!ids.ok()) return AsFieldError(field, ids.status());
  return ids;
}

absl::StatusOr<std::vector<TokenId>> EncodeChat(const ChatPrompt& chat, bool add_special_tokens,
                                                const ServedModel& model, size_t max_tokens) {
  if (chat.messages.empty()) return FieldError("messages", "empty; send at least one");
  if (chat.messages.size() > limits::kChatMessages) {
    return FieldError("messages", absl::StrCat(chat.messages.size(),
                                               " are too many; allowed: ", limits::kChatMessages));
  }
  for (const ChatMessage& message : chat.messages) {
    if (!IsValidUtf8(message.role) || !IsValidUtf8(message.content)) {
      return FieldError("messages", "not UTF-8");
    }
  }
  if (!model.chat_template) {
    return FieldError("messages", "this model has no chat template; send a prompt");
  }
  absl::StatusOr<std::string> text = model.chat_template->Render(chat.messages, chat.context);
  if (!text.ok()) return AsFieldError("messages", text.status());
  return EncodeText(*text, add_special_tokens, model, "messages", max_tokens);
}

absl::Status CheckPromptIds(const std::vector<TokenId>& ids, uint32_t vocab_size,
                            const char* field) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < vocab_size) continue;
    return FieldError(field,
                      absl::StrCat("token id ", ids[i], " at index ", i,
                                   " is not in the vocabulary; allowed: [0, ", vocab_size, ")"));
  }
  return absl::OkStatus();
}

absl::Status TooLong(const char* field, size_t tokens, uint32_t max_model_len) {
  return FieldError(
      field, absl::StrCat(tokens, " tokens leave no room to answer; allowed: ", max_model_len - 1,
                          " (max-model-len is ", max_model_len, ")"));
}

absl::Status FitContext(const ClientSampling& asked, const DoorDefaults& defaults,
                        const ServedModel& model, const char* field, Request* request) {
  const size_t prompt_tokens = request->prompt.size();
  if (prompt_tokens >= model.max_model_len) {
    return TooLong(field, prompt_tokens, model.max_model_len);
  }
  const uint32_t left = model.max_model_len - static_cast<uint32_t>(prompt_tokens);
  SamplingParams& sampling = request->sampling;
  if (!asked.max_tokens) {
    sampling.max_tokens = std::min(left, defaults.max_tokens.value_or(left));
  }
  if (sampling.max_tokens > left) {
    return FieldError(
        asked.max_tokens_field,
        absl::StrCat(sampling.max_tokens, " with a prompt of ", prompt_tokens,
                     " tokens is above max-model-len ", model.max_model_len, "; allowed: ", left));
  }
  if (sampling.min_tokens > sampling.max_tokens) {
    return FieldError("min_tokens", absl::StrCat(sampling.min_tokens, " is above ",
                                                 asked.max_tokens_field, " ", sampling.max_tokens));
  }
  return absl::OkStatus();
}

std::vector<TokenId> EndingIds(const SamplingParams& sampling, const ServedModel& model) {
  std::vector<TokenId> ids = sampling.stop_token_ids;
  if (!sampling.ignore_eos) {
    ids.insert(ids.end(), model.eos_token_ids.begin(), model.eos_token_ids.end());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace

absl::Status CheckModel(std::string_view asked, const ServedModel& model) {
  if (asked.empty() || asked == model.name) return absl::OkStatus();
  if (absl::Status status = CheckIdentifier("model", asked); !status.ok()) return status;
  return UnknownModelError(asked, model.name);
}

absl::StatusOr<std::vector<TokenId>> EncodePrompt(const ClientRequest& client,
                                                  const ServedModel& model,
                                                  const char* prompt_field, size_t max_tokens) {
  absl::StatusOr<std::vector<TokenId>> ids;
  if (const auto* text = std::get_if<std::string>(&client.prompt)) {
    ids = EncodeText(*text, client.add_special_tokens.value_or(true), model, prompt_field,
                     max_tokens);
  } else if (const auto* given = std::get_if<std::vector<TokenId>>(&client.prompt)) {
    absl::Status status = CheckPromptIds(*given, model.vocab_size, prompt_field);
    if (!status.ok()) return status;
    ids = *given;
  } else if (const auto* chat = std::get_if<ChatPrompt>(&client.prompt)) {
    ids = EncodeChat(*chat, client.add_special_tokens.value_or(false), model, max_tokens);
  } else {
    return FieldError(prompt_field, "missing; send text, token ids or messages");
  }
  return ids;
}

size_t TokenizeLimit(const ServedModel& model) {
  return std::max<size_t>(size_t{2} * model.max_model_len, limits::kTokenizeTokens);
}

absl::Status CheckDetokenize(size_t tokens, const ServedModel& model, const char* field) {
  if (tokens <= TokenizeLimit(model)) return absl::OkStatus();
  return FieldError(field,
                    absl::StrCat(tokens, " tokens are too many; allowed: ", TokenizeLimit(model)));
}

absl::StatusOr<std::string> DecodeTokens(const std::vector<TokenId>& ids, const ServedModel& model,
                                         const char* field) {
  absl::Status status = CheckDetokenize(ids.size(), model, field);
  if (status.ok()) status = CheckPromptIds(ids, model.vocab_size, field);
  if (!status.ok()) return status;
  return model.tokenizer->Decode(ids, /*skip_special_tokens=*/false);
}

absl::StatusOr<Request> BuildRequest(const ClientRequest& client, const ServedModel& model,
                                     const DoorDefaults& defaults, int64_t now_ms) {
  absl::Status status = CheckModel(client.model, model);
  if (status.ok()) status = CheckIdentifier("request_id", client.request_id);
  if (!status.ok()) return status;
  absl::StatusOr<SamplingParams> sampling = BuildSampling(client.sampling, model.vocab_size);
  if (!sampling.ok()) return sampling.status();

  const bool is_chat = std::holds_alternative<ChatPrompt>(client.prompt);
  const char* const field = is_chat ? "messages" : defaults.prompt_field;
  // Ids are counted before they are copied.
  if (const auto* ids = std::get_if<std::vector<TokenId>>(&client.prompt)) {
    if (ids->size() >= model.max_model_len) {
      return TooLong(field, ids->size(), model.max_model_len);
    }
  }
  absl::StatusOr<std::vector<TokenId>> prompt =
      EncodePrompt(client, model, field, model.max_model_len);
  if (!prompt.ok()) return prompt.status();
  if (prompt->empty()) return FieldError(field, "empty; send at least one token");
  // A tokenizer may know tokens that the weights do not.
  status = CheckPromptIds(*prompt, model.vocab_size, field);
  if (!status.ok()) return status;

  Request request;
  request.external_id = client.request_id.empty() ? MakeRequestId() : client.request_id;
  request.prompt = *std::move(prompt);
  request.sampling = *std::move(sampling);
  request.priority = client.priority;
  request.arrival_ms = now_ms;
  request.deadline_ms = client.deadline_ms;
  request.cache_salt = client.cache_salt;
  status = FitContext(client.sampling, defaults, model, field, &request);
  if (!status.ok()) return status;
  request.ending_ids = EndingIds(request.sampling, model);
  return request;
}

std::string MakeRequestId() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrFormat("%016x%016x", random(), random());
}

}  // namespace lockstep
