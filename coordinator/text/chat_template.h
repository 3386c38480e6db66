// A model's chat template (Jinja, as Hugging Face renders it): messages to
// prompt text, with the special tokens, trim_blocks and lstrip_blocks,
// `raise_exception`, `strftime_now`, `tojson`, Python's string methods and loop
// controls that such templates rely on.
//
// A template is a program from the model's directory. Its steps, recursion and
// output are bounded, and it reaches no file, clock (but strftime_now) or
// network; the memory of a value that it keeps doubling is not bounded, so it is
// to be trusted as the model is. Thread-safe; copies share the compiled template.
//
// Not as in Jinja: the % operator does not format strings, a tuple is written as
// a list, round() rounds halves away from zero.
#ifndef LOCKSTEP_COORDINATOR_TEXT_CHAT_TEMPLATE_H_
#define LOCKSTEP_COORDINATOR_TEXT_CHAT_TEMPLATE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace lockstep {

struct ChatMessage {
  std::string role;
  std::string content;
  // Text that came in parts; used instead of `content` when there are any. A
  // template that reads lists gets the list, another one the parts joined by a
  // newline.
  std::vector<std::string> parts = {};
  // Of an assistant: a JSON array of {"id", "type", "function": {"name",
  // "arguments": object}}. "" when it called nothing.
  std::string tool_calls_json = {};
  std::string tool_call_id = {};  // of a tool's answer, as is `name`
  std::string name = {};
};

// What a template sees beside the messages.
struct ChatContext {
  bool add_generation_prompt = true;
  std::string tools_json = {};      // a JSON array of functions; "" for none
  std::string variables_json = {};  // a JSON object whose entries are names of their own
};

class ChatTemplate {
 public:
  // chat_template.jinja before tokenizer_config.json's chat_template (a string,
  // or a list of which the entry "default" counts); nullopt when the model has
  // neither. A template that does not compile is InvalidArgument with file and
  // line.
  static absl::StatusOr<std::optional<ChatTemplate>> Load(const std::string& model_dir);

  // The prompt text; encode it without adding special tokens, as the template
  // writes its own. InvalidArgument: the template refused the messages
  // (raise_exception, with its message) or failed on them; ResourceExhausted:
  // it ran or wrote more than is allowed for messages of this size.
  absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                     bool add_generation_prompt) const;
  // As Render, at a given time for strftime_now (UTC seconds since 1970).
  absl::StatusOr<std::string> RenderAt(absl::Span<const ChatMessage> messages,
                                       bool add_generation_prompt, int64_t unix_seconds) const;
  // As Render, with tools and variables. InvalidArgument for JSON that is none
  // and for a variable of a name that the template has from elsewhere.
  absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                     const ChatContext& context) const;
  // As the model's file has it.
  const std::string& source() const;

 private:
  struct Impl;
  absl::StatusOr<std::string> RenderAt(absl::Span<const ChatMessage> messages,
                                       const ChatContext& context, int64_t unix_seconds) const;
  // Whether content that is a list of text parts is shown as its text.
  bool ReadsParts() const;

  explicit ChatTemplate(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_CHAT_TEMPLATE_H_
