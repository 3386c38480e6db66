#include "coordinator/api/http/chat_request.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/http/chat_messages.h"
#include "coordinator/api/limits.h"

namespace lockstep {
namespace {

void ReadLogprobs(FieldReader* fields, ClientSampling* out) {
  const bool wanted = fields->Bool("logprobs").value_or(false);
  const std::optional<int64_t> top = fields->Integer("top_logprobs");
  if (top && !wanted) fields->Fail(FieldError("top_logprobs", "only with logprobs: true"));
  if (wanted) out->logprobs = top.value_or(0);
  out->logprobs_field = "top_logprobs";
}

void ReadResponseFormat(FieldReader* fields) {
  const Json* const format = fields->Raw("response_format");
  if (format == nullptr) return;
  FieldReader inner(*format, "response_format.");
  const std::optional<std::string> type = inner.String("type");
  if (inner.status().ok() && type != "text") {
    return fields->Fail(FieldError("response_format", "only {\"type\": \"text\"} is supported"));
  }
  fields->Fail(inner.Finish());
}

// Whether calls are looked for, and the model told of the tools at all.
bool ReadToolChoice(FieldReader* fields) {
  const Json* const choice = fields->Raw("tool_choice");
  if (choice == nullptr || *choice == "auto") return true;
  if (*choice != "none") {
    fields->Fail(FieldError(
        "tool_choice", absl::StrCat(EchoJson(*choice), " is not supported; allowed: none, auto")));
  }
  return false;
}

void ReadTools(FieldReader* fields, const std::string& body, ChatContext* context,
               std::vector<std::string>* names) {
  const Json* const tools = fields->Raw("tools");
  const bool use = ReadToolChoice(fields);
  if (tools == nullptr) return;
  absl::StatusOr<std::vector<std::string>> read = ReadToolNames(*tools);
  if (!read.ok()) return fields->Fail(read.status());
  if (!use || read->empty()) return;
  *names = *std::move(read);
  context->tools_json = OrderedMember(body, "tools");
}

void ReadVariables(FieldReader* fields, const std::string& body, ChatContext* context) {
  const Json* const variables = fields->Raw("chat_template_kwargs");
  if (variables == nullptr) return;
  if (!variables->is_object()) {
    return fields->Fail(FieldError("chat_template_kwargs",
                                   absl::StrCat("expected an object, got ", EchoJson(*variables))));
  }
  fields->Fail(CheckSize(*variables, "chat_template_kwargs"));
  for (const auto& [name, value] : variables->items()) {
    const bool taken = name == "messages" || name == "tools" || name == "documents" ||
                       name == "add_generation_prompt" || name.ends_with("_token");
    if (!taken) continue;
    return fields->Fail(FieldError("chat_template_kwargs",
                                   absl::StrCat("the name '", Echo(name), "' is not free")));
  }
  context->variables_json = OrderedMember(body, "chat_template_kwargs");
}

// Fields that are accepted only where they change nothing.
void ReadNeutral(FieldReader* fields) {
  fields->Identifier("user");
  if (!fields->Bool("parallel_tool_calls").value_or(true)) {
    fields->Fail(FieldError("parallel_tool_calls", "false is not supported"));
  }
  if (fields->Bool("store").value_or(false)) {
    fields->Fail(FieldError("store", "true is not supported"));
  }
  for (const char* name : {"functions", "function_call"}) {
    if (fields->Raw(name) != nullptr) {
      fields->Fail(FieldError(name, "not supported; use tools and tool_choice"));
    }
  }
  if (fields->Raw("prompt_logprobs") != nullptr) {
    fields->Fail(FieldError("prompt_logprobs", "not supported here; use /v1/completions"));
  }
}

}  // namespace

absl::StatusOr<CompletionRequest> ReadChatRequest(const std::string& text) {
  const absl::StatusOr<Json> body = ParseJson(text);
  if (!body.ok()) return body.status();
  FieldReader fields(*body);
  CompletionRequest out;
  ClientRequest client;
  ChatPrompt chat;
  ReadCommon(&fields, &client, &out);
  ReadLogprobs(&fields, &client.sampling);
  ReadResponseFormat(&fields);
  ReadTools(&fields, text, &chat.context, &out.tools);
  ReadVariables(&fields, text, &chat.context);
  ReadNeutral(&fields);
  chat.context.add_generation_prompt = fields.Bool("add_generation_prompt").value_or(true);
  const Json* const messages = fields.Raw("messages");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;

  if (messages == nullptr) return FieldError("messages", "missing; send at least one");
  absl::StatusOr<std::vector<ChatMessage>> read = ReadMessages(*messages);
  if (!read.ok()) return read.status();
  chat.messages = *std::move(read);
  client.prompt = std::move(chat);
  out.logprobs = client.sampling.logprobs.has_value();
  if (const int64_t n = client.sampling.n.value_or(1); n >= 1 && n <= limits::kMaxN) {
    out.n = static_cast<uint32_t>(n);
  }
  out.prompts.push_back(std::move(client));
  return out;
}

}  // namespace lockstep
