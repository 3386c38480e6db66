#include "coordinator/api/http/chat_messages.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/limits.h"

namespace lockstep {
namespace {

absl::Status ReadContent(const Json& content, const std::string& where, ChatMessage* out) {
  if (content.is_string()) {
    out->content = content.get<std::string>();
    return absl::OkStatus();
  }
  if (!content.is_array()) {
    return FieldError(where, absl::StrCat("expected text or text parts, got ", EchoJson(content)));
  }
  for (size_t i = 0; i < content.size(); ++i) {
    FieldReader part(content[i], absl::StrCat(where, "[", i, "]."));
    const std::optional<std::string> type = part.String("type");
    if (part.status().ok() && type != "text") {
      return FieldError(absl::StrCat(where, "[", i, "].type"), "only text parts are supported");
    }
    std::optional<std::string> text = part.String("text");
    if (absl::Status status = part.Finish(); !status.ok()) return status;
    if (!text) return FieldError(absl::StrCat(where, "[", i, "].text"), "missing");
    out->parts.push_back(*std::move(text));
  }
  return absl::OkStatus();
}

bool IsFunctionName(const std::string& name) {
  return !name.empty() && name.size() <= limits::kToolNameBytes &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isalnum(c) || c == '_' || c == '-'; });
}

absl::Status BadName(const std::string& field) {
  return FieldError(field, absl::StrCat("expected 1 to ", limits::kToolNameBytes,
                                        " of letters, digits, _ and -"));
}

// An earlier call as templates read it: the arguments an object, not its text.
absl::StatusOr<std::string> ReadCall(const Json& call, const std::string& where) {
  FieldReader fields(call, where + ".");
  const std::string id = fields.Identifier("id").value_or("");
  const std::string type = fields.String("type").value_or("function");
  const Json* const function = fields.Raw("function");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (type != "function") return FieldError(where + ".type", "only function is supported");
  if (function == nullptr) return FieldError(where + ".function", "missing");
  FieldReader inner(*function, where + ".function.");
  const std::string name = inner.String("name").value_or("");
  const std::string arguments = inner.String("arguments").value_or("{}");
  if (absl::Status status = inner.Finish(); !status.ok()) return status;
  if (!IsFunctionName(name)) return BadName(where + ".function.name");
  const std::string field = where + ".function.arguments";
  const absl::StatusOr<Json> parsed = ParseJson(arguments);
  if (!parsed.ok() || !parsed->is_object()) {
    return FieldError(field, "expected the text of a JSON object");
  }
  // As the model wrote it, keys in its order.
  return absl::StrCat("{\"id\":", Json(id).dump(),
                      ",\"type\":\"function\",\"function\":{\"name\":\"", name,
                      "\",\"arguments\":", arguments, "}}");
}

absl::Status ReadCalls(const Json& calls, const std::string& where, ChatMessage* out) {
  if (!calls.is_array()) {
    return FieldError(where, absl::StrCat("expected an array, got ", EchoJson(calls)));
  }
  if (calls.size() > limits::kTools) {
    return FieldError(where,
                      absl::StrCat(calls.size(), " are too many; allowed: ", limits::kTools));
  }
  if (calls.empty()) return absl::OkStatus();
  out->tool_calls_json = std::string("[");
  for (size_t i = 0; i < calls.size(); ++i) {
    absl::StatusOr<std::string> call = ReadCall(calls[i], absl::StrCat(where, "[", i, "]"));
    if (!call.ok()) return call.status();
    absl::StrAppend(&out->tool_calls_json, i == 0 ? "" : ",", *call);
  }
  out->tool_calls_json += "]";
  return absl::OkStatus();
}

absl::StatusOr<ChatMessage> ReadMessage(const Json& json, const std::string& where) {
  ChatMessage out;
  FieldReader fields(json, where + ".");
  const std::optional<std::string> role = fields.String("role");
  const Json* const content = fields.Raw("content");
  out.name = fields.Identifier("name").value_or("");
  const Json* calls = nullptr;
  if (role == "assistant") {
    calls = fields.Raw("tool_calls");
    // What an answer of ours has, or an empty place for what it never has.
    for (const char* name : {"refusal", "audio", "function_call", "annotations"}) {
      const Json* const value = fields.Raw(name);
      if (value == nullptr || (value->is_array() && value->empty())) continue;
      fields.Fail(FieldError(absl::StrCat(where, ".", name), "not supported"));
    }
  } else if (role == "tool") {
    out.tool_call_id = fields.Identifier("tool_call_id").value_or("");
  }
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  if (!role) return FieldError(where + ".role", "missing");
  if (role != "system" && role != "developer" && role != "user" && role != "assistant" &&
      role != "tool") {
    return FieldError(where + ".role",
                      absl::StrCat("'", Echo(*role),
                                   "' is not supported; allowed: system, user, assistant, tool"));
  }
  out.role = role == "developer" ? "system" : *role;
  if (calls != nullptr) {
    absl::Status status = ReadCalls(*calls, where + ".tool_calls", &out);
    if (!status.ok()) return status;
  }
  if (content != nullptr) {
    absl::Status status = ReadContent(*content, where + ".content", &out);
    if (!status.ok()) return status;
  } else if (out.tool_calls_json.empty()) {
    return FieldError(where + ".content", "missing");
  }
  return out;
}

size_t CountValues(const Json& value) {
  size_t count = 1;
  if (value.is_structured()) {
    for (const Json& each : value) count += CountValues(each);  // as deep as kJsonDepth
  }
  return count;
}

}  // namespace

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
    absl::StatusOr<ChatMessage> message = ReadMessage(list[i], absl::StrCat("messages[", i, "]"));
    if (!message.ok()) return message.status();
    messages.push_back(*std::move(message));
  }
  return messages;
}

absl::StatusOr<std::vector<std::string>> ReadToolNames(const Json& tools) {
  if (!tools.is_array()) {
    return FieldError("tools", absl::StrCat("expected an array, got ", EchoJson(tools)));
  }
  if (tools.size() > limits::kTools) {
    return FieldError("tools",
                      absl::StrCat(tools.size(), " are too many; allowed: ", limits::kTools));
  }
  if (absl::Status status = CheckSize(tools, "tools"); !status.ok()) return status;
  std::vector<std::string> names;
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string where = absl::StrCat("tools[", i, "]");
    FieldReader fields(tools[i], where + ".");
    const std::string type = fields.String("type").value_or("");
    const Json* const function = fields.Raw("function");
    if (absl::Status status = fields.Finish(); !status.ok()) return status;
    if (type != "function") return FieldError(where + ".type", "only function is supported");
    if (function == nullptr) return FieldError(where + ".function", "missing");
    FieldReader inner(*function, where + ".function.");
    const std::string name = inner.String("name").value_or("");
    inner.String("description");
    const Json* const parameters = inner.Raw("parameters");
    const bool strict = inner.Bool("strict").value_or(false);
    if (absl::Status status = inner.Finish(); !status.ok()) return status;
    if (!IsFunctionName(name)) return BadName(where + ".function.name");
    if (parameters != nullptr && !parameters->is_object()) {
      return FieldError(where + ".function.parameters",
                        absl::StrCat("expected an object, got ", EchoJson(*parameters)));
    }
    if (strict) {
      return FieldError(where + ".function.strict",
                        "not supported: arguments are not held to the schema");
    }
    names.push_back(name);
  }
  return names;
}

absl::Status CheckSize(const Json& value, const char* field) {
  if (CountValues(value) <= limits::kToolValues) return absl::OkStatus();
  return FieldError(field, absl::StrCat("more than ", limits::kToolValues, " JSON values in all"));
}

std::string OrderedMember(const std::string& body, const char* field) {
  // Skips the other members, whose objects may be too wide to be read in order.
  const auto keep = [field](int depth, nlohmann::ordered_json::parse_event_t event,
                            nlohmann::ordered_json& parsed) {
    return depth != 1 || event != nlohmann::ordered_json::parse_event_t::key || parsed == field;
  };
  const auto whole = nlohmann::ordered_json::parse(body, keep, /*allow_exceptions=*/false);
  const auto found = whole.find(field);
  return found == whole.end() ? std::string() : found->dump();
}

}  // namespace lockstep
