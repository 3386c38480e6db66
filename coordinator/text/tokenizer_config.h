// What tokenizer_config.json and special_tokens_map.json say, beside
// tokenizer.json: the names of the special tokens and the chat template.
// Plain values.
#ifndef LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_CONFIG_H_
#define LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_CONFIG_H_

#include <cstddef>
#include <map>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace lockstep {

struct TokenizerConfig {
  // "bos_token" -> "<s>" and so on: what a chat template may use by name.
  std::map<std::string, std::string> special_tokens;
  // JSON array of tokens that tokenizer.json may lack, in the order in which
  // they take new ids: {"content", "special", "lstrip", "rstrip", "normalized",
  // "single_word"}.
  std::string added_tokens_json = "[]";
  // From chat_template in tokenizer_config.json: the string, or of a list the
  // entry named "default".
  std::optional<std::string> chat_template;

  // Both files may be missing; a bad one is InvalidArgument that names it.
  static absl::StatusOr<TokenizerConfig> Load(const std::string& model_dir);

  const std::string& bos_token() const { return Special("bos_token"); }
  const std::string& eos_token() const { return Special("eos_token"); }

 private:
  const std::string& Special(const std::string& name) const;
};

// The whole of a regular file of at most `max_bytes`. NotFound if there is no
// such file; every error names the path.
absl::StatusOr<std::string> ReadModelFile(const std::string& path, size_t max_bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_CONFIG_H_
