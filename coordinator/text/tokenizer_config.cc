#include "coordinator/text/tokenizer_config.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxConfigBytes = size_t{64} << 20;
// In the order in which Hugging Face adds those that are missing.
constexpr const char* kSpecialTokens[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                          "pad_token", "cls_token", "mask_token"};
constexpr const char* kTokenFlags[] = {"single_word", "lstrip", "rstrip", "normalized"};

absl::Status Bad(const std::string& path, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::string(what)));
}

// nullopt if there is no such file.
absl::StatusOr<std::optional<Json>> ReadJsonObject(const std::string& path) {
  absl::StatusOr<std::string> text = ReadModelFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  if (!text.ok()) return text.status();
  // The parser takes a NUL byte for the end of its input.
  if (text->find('\0') != std::string::npos) return Bad(path, "not JSON: has a NUL byte");
  Json json = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return Bad(path, "not JSON");
  if (!json.is_object()) return Bad(path, "expected a JSON object");
  return json;
}

// A token is written as its text or as an object with its text and flags; a
// null stands for none.
absl::StatusOr<std::optional<Json>> ParseToken(const Json& value, const std::string& path,
                                               const std::string& field) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return Json{{"content", value}};
  if (!value.is_object() || !value.contains("content") || !value["content"].is_string()) {
    return Bad(path, absl::StrCat(field, ": expected a string or an object with \"content\""));
  }
  Json token = {{"content", value["content"]}};
  for (const char* flag : kTokenFlags) {
    if (!value.contains(flag) || value[flag].is_null()) continue;
    if (!value[flag].is_boolean()) {
      return Bad(path, absl::StrCat(field, ".", flag, ": expected true or false"));
    }
    token[flag] = value[flag];
  }
  token["special"] = value.contains("special") && value["special"] == Json(true);
  return token;
}

class Parser {
 public:
  absl::Status ParseFile(const std::string& path) {
    absl::StatusOr<std::optional<Json>> json = ReadJsonObject(path);
    if (!json.ok()) return json.status();
    if (!*json) return absl::OkStatus();
    if (absl::Status s = AddedTokens(**json, path); !s.ok()) return s;
    if (absl::Status s = SpecialTokens(**json, path); !s.ok()) return s;
    return ChatTemplate(**json, path);
  }

  TokenizerConfig Take() {
    Json added = Json::array();
    for (auto& [id, token] : by_id_) added.push_back(std::move(token));
    for (const char* name : kSpecialTokens) {
      if (auto it = special_.find(name); it != special_.end()) added.push_back(it->second);
    }
    for (Json& token : additional_) added.push_back(std::move(token));
    config_.added_tokens_json = added.dump(-1, ' ', false, Json::error_handler_t::replace);
    return std::move(config_);
  }

 private:
  absl::Status AddedTokens(const Json& json, const std::string& path) {
    const auto entries = json.find("added_tokens_decoder");
    if (entries == json.end() || entries->is_null()) return absl::OkStatus();
    if (!entries->is_object()) return Bad(path, "added_tokens_decoder: expected an object");
    for (const auto& [key, value] : entries->items()) {
      const std::string field = absl::StrCat("added_tokens_decoder.", key);
      uint32_t id = 0;
      if (!absl::SimpleAtoi(key, &id)) return Bad(path, field + ": the key is not a token id");
      absl::StatusOr<std::optional<Json>> token = ParseToken(value, path, field);
      if (!token.ok()) return token.status();
      if (*token) by_id_.emplace(id, **token);
    }
    return absl::OkStatus();
  }

  absl::Status SpecialTokens(const Json& json, const std::string& path) {
    for (const char* name : kSpecialTokens) {
      const auto value = json.find(name);
      if (value == json.end()) continue;
      absl::StatusOr<std::optional<Json>> token = ParseToken(*value, path, name);
      if (!token.ok()) return token.status();
      if (*token) AddSpecial(name, **token);
    }
    const auto more = json.find("additional_special_tokens");
    if (more == json.end() || !more->is_array()) return absl::OkStatus();
    for (const Json& value : *more) {
      absl::StatusOr<std::optional<Json>> token =
          ParseToken(value, path, "additional_special_tokens");
      if (!token.ok()) return token.status();
      if (!*token) continue;
      (**token)["special"] = true;
      additional_.push_back(std::move(**token));
    }
    return absl::OkStatus();
  }

  // The first file that names a token decides.
  void AddSpecial(const std::string& name, Json token) {
    std::string text = token["content"];
    token["special"] = true;
    if (!text.empty() && special_.emplace(name, std::move(token)).second) {
      config_.special_tokens.emplace(name, std::move(text));
    }
  }

  absl::Status ChatTemplate(const Json& json, const std::string& path) {
    const auto value = json.find("chat_template");
    if (value == json.end() || value->is_null()) return absl::OkStatus();
    if (value->is_string()) {
      config_.chat_template = value->get<std::string>();
      return absl::OkStatus();
    }
    if (!value->is_array()) return Bad(path, "chat_template: expected a string or a list");
    std::string names;
    for (const Json& entry : *value) {
      if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string() ||
          !entry.contains("template") || !entry["template"].is_string()) {
        return Bad(path, "chat_template: expected entries with \"name\" and \"template\"");
      }
      if (entry["name"] == "default") config_.chat_template = entry["template"];
      absl::StrAppend(&names, names.empty() ? "" : ", ", entry["name"].get<std::string>());
    }
    if (!config_.chat_template && !value->empty()) {
      return Bad(path,
                 absl::StrCat("chat_template: no entry is named \"default\" (found ", names, ")"));
    }
    return absl::OkStatus();
  }

  TokenizerConfig config_;
  std::map<uint32_t, Json> by_id_;
  std::map<std::string, Json> special_;
  std::vector<Json> additional_;
};

}  // namespace

absl::StatusOr<TokenizerConfig> TokenizerConfig::Load(const std::string& model_dir) {
  Parser parser;
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    if (absl::Status s = parser.ParseFile(absl::StrCat(model_dir, "/", name)); !s.ok()) return s;
  }
  return parser.Take();
}

const std::string& TokenizerConfig::Special(const std::string& name) const {
  static const std::string& none = *new std::string;
  const auto it = special_tokens.find(name);
  return it == special_tokens.end() ? none : it->second;
}

absl::StatusOr<std::string> ReadModelFile(const std::string& path, size_t max_bytes) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    const std::string message = absl::StrCat(path, ": ", std::strerror(errno));
    if (errno == ENOENT || errno == ENOTDIR) return absl::NotFoundError(message);
    return absl::InvalidArgumentError(message);
  }
  // A FIFO would block, a device never end.
  if (!S_ISREG(info.st_mode)) return Bad(path, "not a regular file");
  if (static_cast<uint64_t>(info.st_size) > max_bytes) {
    return Bad(path, absl::StrCat(info.st_size, " bytes; at most ", max_bytes, " are accepted"));
  }
  std::string text(static_cast<size_t>(info.st_size), '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!in || in.gcount() != static_cast<std::streamsize>(text.size())) {
    return Bad(path, "could not be read");
  }
  return text;
}

}  // namespace lockstep
