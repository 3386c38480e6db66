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

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace lockstep {

struct ChatMessage {
  std::string role;
  std::string content;
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

 private:
  struct Impl;
  explicit ChatTemplate(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_CHAT_TEMPLATE_H_
