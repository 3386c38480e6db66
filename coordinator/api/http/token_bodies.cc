#include "coordinator/api/http/token_bodies.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/chat_messages.h"
#include "coordinator/api/http/json_reader.h"

namespace lockstep {

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
    ChatPrompt chat{*std::move(read)};
    chat.context.add_generation_prompt = add_generation_prompt.value_or(true);
    client.prompt = std::move(chat);
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
  if (absl::Status fits = CheckDetokenize(tokens->size(), model, "tokens"); !fits.ok()) return fits;
  const absl::StatusOr<std::vector<TokenId>> ids = ReadTokenIds(*tokens, "tokens");
  if (!ids.ok()) return ids.status();
  absl::StatusOr<std::string> text = DecodeTokens(*ids, model, "tokens");
  if (!text.ok()) return text.status();
  nlohmann::ordered_json answer;
  answer["prompt"] = *std::move(text);
  return answer.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string TokenizerInfoBody(const ServedModel& model) {
  nlohmann::ordered_json answer;
  // Whatever class made the files, they are read as tokenizer.json says.
  answer["tokenizer_class"] = "PreTrainedTokenizerFast";
  answer["vocab_size"] = model.tokenizer->vocab_size();
  answer["model_max_length"] = model.max_model_len;
  const auto token = [](const std::string& text) {
    return text.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(text);
  };
  answer["bos_token"] = token(model.tokenizer->bos_token());
  answer["eos_token"] = token(model.tokenizer->eos_token());
  answer["eos_token_ids"] = model.eos_token_ids;
  answer["chat_template"] = model.chat_template
                                ? nlohmann::ordered_json(model.chat_template->source())
                                : nlohmann::ordered_json(nullptr);
  return answer.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace lockstep
