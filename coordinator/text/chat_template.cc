#include "coordinator/text/chat_template.h"

#include <ctime>
#include <map>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
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
  return std::optional(ChatTemplate(std::move(impl)));
}

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatMessage> messages,
                                                 bool add_generation_prompt) const {
  return RenderAt(messages, add_generation_prompt, std::time(nullptr));
}

absl::StatusOr<std::string> ChatTemplate::RenderAt(absl::Span<const ChatMessage> messages,
                                                   bool add_generation_prompt,
                                                   int64_t unix_seconds) const {
  Json context = Json::object();
  for (const auto& [name, text] : impl_->special_tokens) context[name] = text;
  Json list = Json::array();
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!IsValidUtf8(messages[i].role) || !IsValidUtf8(messages[i].content)) {
      return absl::InvalidArgumentError(absl::StrCat("messages[", i, "]: not UTF-8"));
    }
    list.push_back({{"role", messages[i].role}, {"content", messages[i].content}});
  }
  context["messages"] = std::move(list);
  context["add_generation_prompt"] = add_generation_prompt;
  context["tools"] = nullptr;
  context["documents"] = nullptr;
  const std::string json = context.dump(-1, ' ', false, Json::error_handler_t::replace);

  ffi::Text text, error;
  ffi::Call call;
  const LockstepTextStatus status = lockstep_template_render(
      impl_->handle, json.data(), json.size(), unix_seconds,
      kBaseSteps + kStepsPerMessage * messages.size(),
      kBaseOutputBytes + kOutputPerContextByte * json.size(), text.out(), error.out());
  if (status == LOCKSTEP_TEXT_RAISED) return absl::InvalidArgumentError(error.str());
  if (status != LOCKSTEP_TEXT_OK) return ffi::ToStatus(status, "chat template", error);
  return text.str();
}

}  // namespace lockstep
