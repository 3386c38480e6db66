#include "coordinator/api/http/token_bodies.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/json_reader.h"
#include "coordinator/api/limits.h"

namespace lockstep {
namespace {

// A message's content: text, or text parts joined by a newline.
absl::StatusOr<std::string> ReadContent(const Json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) {
    return FieldError(where, absl::StrCat("expected text or text parts, got ", EchoJson(content)));
  }
  std::string joined;
  for (size_t i = 0; i < content.size(); ++i) {
    FieldReader part(content[i], absl::StrCat(where, "[", i, "]."));
    const std::optional<std::string> type = part.String("type");
    const std::optional<std::string> text = part.String("text");
    if (absl::Status status = part.Finish(); !status.ok()) return status;
    if (type != "text" || !text) {
      return FieldError(absl::StrCat(where, "[", i, "].type"), "only text parts are supported");
    }
    absl::StrAppend(&joined, i == 0 ? "" : "\n", *text);
  }
  return joined;
}

absl::StatusOr<std::vector<ChatMessage>> ReadMessages(const Json& list) {
  if (!list.is_array()) {
    return FieldError("messages", absl::StrCat("expected an array, got ", EchoJson(list)));
  }
  if (list.size() > limits::kChatMessages) {
    return FieldError("messages",
                      absl::StrCat(list.size(), " are too many; allowed: ", limits::kChatMessages));
  }
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = absl::StrCat("messages[", i, "]");
    FieldReader fields(list[i], where + ".");
    const std::optional<std::string> role = fields.String("role");
    const Json* const content = fields.Raw("content");
    if (absl::Status status = fields.Finish(); !status.ok()) return status;
    if (!role) return FieldError(where + ".role", "missing");
    if (content == nullptr) return FieldError(where + ".content", "missing");
    absl::StatusOr<std::string> text = ReadContent(*content, where + ".content");
    if (!text.ok()) return text.status();
    messages.push_back({*role, *std::move(text)});
  }
  return messages;
}

}  // namespace

absl::StatusOr<std::string> TokenizeBody(const std::string& body, const ServedModel& model) {
  const absl::StatusOr<Json> json = ParseJson(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  ClientRequest client;
  client.model = fields.Identifier("model").value_or("");
  client.add_special_tokens = fields.Bool("add_special_tokens");
  const std::optional<bool> add_generation_prompt = fields.Bool("add_generation_prompt");
  std::optional<std::string> prompt = fields.String("prompt");
  const Json* const messages = fields.Raw("messages");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (absl::Status status = CheckModel(client.model, model); !status.ok()) return status;
  if (prompt && messages != nullptr) {
    return FieldError("messages", "sent with a prompt; send one of them");
  }
  if (messages != nullptr) {
    absl::StatusOr<std::vector<ChatMessage>> read = ReadMessages(*messages);
    if (!read.ok()) return read.status();
    client.prompt = ChatPrompt{*std::move(read), add_generation_prompt.value_or(true)};
  } else if (prompt) {
    client.prompt = *std::move(prompt);
  }
  const absl::StatusOr<std::vector<TokenId>> ids =
      EncodePrompt(client, model, "prompt", TokenizeLimit(model));
  if (!ids.ok()) return ids.status();
  nlohmann::ordered_json answer;
  answer["count"] = ids->size();
  answer["max_model_len"] = model.max_model_len;
  answer["tokens"] = *ids;
  return answer.dump();
}

absl::StatusOr<std::string> DetokenizeBody(const std::string& body, const ServedModel& model) {
  const absl::StatusOr<Json> json = ParseJson(body);
  if (!json.ok()) return json.status();
  FieldReader fields(*json);
  const std::string asked = fields.Identifier("model").value_or("");
  const Json* const tokens = fields.Raw("tokens");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (absl::Status status = CheckModel(asked, model); !status.ok()) return status;
  if (tokens == nullptr || !tokens->is_array()) {
    return FieldError("tokens", tokens == nullptr
                                    ? std::string("missing; send token ids")
                                    : absl::StrCat("expected an array, got ", EchoJson(*tokens)));
  }
  const absl::StatusOr<std::vector<TokenId>> ids = ReadTokenIds(*tokens, "tokens");
  if (!ids.ok()) return ids.status();
  absl::StatusOr<std::string> text = DecodeTokens(*ids, model, "tokens");
  if (!text.ok()) return text.status();
  nlohmann::ordered_json answer;
  answer["prompt"] = *std::move(text);
  return answer.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace lockstep
