#include "coordinator/text/chat_template.h"

#include <ctime>
#include <map>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/text/ffi/lockstep_text.h"
#include "coordinator/text/internal/ffi.h"
#include "coordinator/text/tokenizer_config.h"
#include "coordinator/text/utf8.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

// Templates are a few KiB; one of a MiB is not a chat template.
constexpr size_t kMaxTemplateBytes = size_t{1} << 20;
// Known templates take up to 70 steps a message, and write each once.
constexpr uint64_t kBaseSteps = 200'000;
constexpr uint64_t kStepsPerMessage = 500;
constexpr size_t kBaseOutputBytes = size_t{1} << 20;
constexpr size_t kOutputPerContextByte = 8;

// A message as templates read it. The message of an error has no position.
absl::StatusOr<std::string> MessageJson(const ChatMessage& message, bool reads_parts) {
  bool valid = true;
  const auto checked = [&valid](const std::string& text) {
    valid = valid && IsValidUtf8(text);
    return text;
  };
  Json json;
  json["role"] = checked(message.role);
  if (message.parts.empty()) {
    json["content"] = checked(message.content);
  } else if (reads_parts) {
    for (const std::string& part : message.parts) {
      json["content"].push_back({{"type", "text"}, {"text", checked(part)}});
    }
  } else {
    json["content"] = checked(absl::StrJoin(message.parts, "\n"));
  }
  if (!message.tool_call_id.empty()) json["tool_call_id"] = checked(message.tool_call_id);
  if (!message.name.empty()) json["name"] = checked(message.name);
  if (!valid) return absl::InvalidArgumentError("not UTF-8");
  std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (message.tool_calls_json.empty()) return text;
  text.pop_back();
  return absl::StrCat(text, ",\"tool_calls\":", message.tool_calls_json, "}");
}

}  // namespace

struct ChatTemplate::Impl {
  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    ffi::Call call;
    lockstep_template_free(handle);
  }

  LockstepTemplate* handle = nullptr;
  std::map<std::string, std::string> special_tokens;
  std::string source;
  bool reads_parts = true;  // while ReadsParts asks
};

absl::StatusOr<std::optional<ChatTemplate>> ChatTemplate::Load(const std::string& model_dir) {
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(model_dir);
  if (!config.ok()) return config.status();
  std::string path = absl::StrCat(model_dir, "/chat_template.jinja");
  absl::StatusOr<std::string> source = ReadModelFile(path, kMaxTemplateBytes);
  if (absl::IsNotFound(source.status())) {
    if (!config->chat_template) return std::nullopt;
    path = absl::StrCat(model_dir, "/tokenizer_config.json: chat_template");
    if (config->chat_template->size() > kMaxTemplateBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": longer than ", kMaxTemplateBytes, " bytes"));
    }
    source = *std::move(config->chat_template);
  }
  if (!source.ok()) return source.status();

  auto impl = std::make_shared<Impl>();
  ffi::Text error;
  ffi::Call call;
  const LockstepTextStatus status =
      lockstep_template_new(source->data(), source->size(), &impl->handle, error.out());
  if (status != LOCKSTEP_TEXT_OK) return ffi::ToStatus(LOCKSTEP_TEXT_INVALID, path, error);
  impl->special_tokens = std::move(config->special_tokens);
  impl->source = *std::move(source);
  impl->reads_parts = ChatTemplate(impl).ReadsParts();
  return std::optional(ChatTemplate(std::move(impl)));
}

const std::string& ChatTemplate::source() const { return impl_->source; }

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatMessage> messages,
                                                 bool add_generation_prompt) const {
  return RenderAt(messages, add_generation_prompt, std::time(nullptr));
}

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatMessage> messages,
                                                 const ChatContext& context) const {
  return RenderAt(messages, context, std::time(nullptr));
}

absl::StatusOr<std::string> ChatTemplate::RenderAt(absl::Span<const ChatMessage> messages,
                                                   bool add_generation_prompt,
                                                   int64_t unix_seconds) const {
  return RenderAt(messages, ChatContext{.add_generation_prompt = add_generation_prompt},
                  unix_seconds);
}

// Asked of the template itself: no look at its source is as sure.
bool ChatTemplate::ReadsParts() const {
  constexpr char kProbe[] = "lockstep probe";
  const ChatMessage probe{.role = "user", .content = "", .parts = {kProbe}};
  const absl::StatusOr<std::string> shown = RenderAt({&probe, 1}, true, 0);
  if (!shown.ok()) return false;
  // What takes the list for a text writes the whole of it.
  const auto has = [&](const char* text) { return shown->find(text) != std::string::npos; };
  return has(kProbe) && !has("'type'") && !has("\"type\"");
}

absl::StatusOr<std::string> ChatTemplate::RenderAt(absl::Span<const ChatMessage> messages,
                                                   const ChatContext& context,
                                                   int64_t unix_seconds) const {
  Json names = Json::object();
  for (const auto& [name, text] : impl_->special_tokens) names[name] = text;
  names["add_generation_prompt"] = context.add_generation_prompt;
  names["documents"] = nullptr;
  std::string json = "{\"messages\":[";
  for (size_t i = 0; i < messages.size(); ++i) {
    absl::StatusOr<std::string> message = MessageJson(messages[i], impl_->reads_parts);
    if (!message.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("messages[", i, "]: ", std::string(message.status().message())));
    }
    absl::StrAppend(&json, i == 0 ? "" : ",", *message);
  }
  // Left as it came: a template may show the keys in the client's order.
  absl::StrAppend(&json, "],\"tools\":", context.tools_json.empty() ? "null" : context.tools_json);
  if (!context.variables_json.empty()) {
    const Json variables = Json::parse(context.variables_json, nullptr, /*allow_exceptions=*/false);
    if (!variables.is_object()) return absl::InvalidArgumentError("variables: not a JSON object");
    for (const auto& [name, value] : variables.items()) {
      if (names.contains(name) || name == "messages" || name == "tools") {
        return absl::InvalidArgumentError(
            absl::StrCat("the name '", name, "' is not free for a variable"));
      }
      names[name] = value;
    }
  }
  const std::string rest = names.dump(-1, ' ', false, Json::error_handler_t::replace);
  absl::StrAppend(&json, ",", rest.substr(1));

  ffi::Text text, error;
  ffi::Call call;
  const LockstepTextStatus status = lockstep_template_render(
      impl_->handle, json.data(), json.size(), unix_seconds,
      kBaseSteps + kStepsPerMessage * messages.size(),
      kBaseOutputBytes + kOutputPerContextByte * json.size(), text.out(), error.out());
  if (status == LOCKSTEP_TEXT_RAISED) return ffi::ToStatus(status, "", error);
  if (status != LOCKSTEP_TEXT_OK) return ffi::ToStatus(status, "chat template", error);
  return text.str();
}

}  // namespace lockstep
