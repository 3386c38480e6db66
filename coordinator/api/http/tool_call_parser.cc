#include "coordinator/api/http/tool_call_parser.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "coordinator/api/http/json_reader.h"

namespace lockstep {
namespace {

constexpr std::string_view kOpen = "<tool_call>";
constexpr std::string_view kClose = "</tool_call>";
constexpr std::string_view kPythonTag = "<|python_tag|>";
constexpr std::string_view kSpace = " \t\r\n";

std::string_view Trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

// The size of the JSON value at the beginning of `text`, an object or an array:
// up to the bracket that closes it. 0 when none does.
size_t BracketedSize(std::string_view text) {
  size_t depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if ((c == '}' || c == ']') && --depth == 0) {
      return i + 1;
    }
  }
  return 0;
}

// The text of member `name` of an object that has been parsed and has it. It
// stays as the model wrote it: keys in its order, numbers with all their digits.
std::string_view MemberText(std::string_view object, std::string_view name) {
  size_t at = 1;
  for (;;) {
    at = object.find('"', at);
    if (at == std::string_view::npos) return {};
    size_t end = at + 1;
    while (object[end] != '"') end += object[end] == '\\' ? 2 : 1;
    const std::string_view key = object.substr(at + 1, end - at - 1);
    const size_t value = object.find_first_not_of(kSpace, object.find(':', end) + 1);
    const std::string_view rest = object.substr(value);
    if (key == name) return rest.substr(0, BracketedSize(rest));
    if (rest[0] == '{' || rest[0] == '[') {
      at = value + BracketedSize(rest);
    } else if (rest[0] == '"') {
      at = value + 1;
      while (object[at] != '"') at += object[at] == '\\' ? 2 : 1;
      ++at;
    } else {
      at = object.find_first_of(",}", value);
    }
  }
}

// How much of the end of `text` could be the beginning of `tag`.
size_t PartialSize(std::string_view text, std::string_view tag) {
  for (size_t size = std::min(text.size(), tag.size() - 1); size > 0; --size) {
    if (text.substr(text.size() - size) == tag.substr(0, size)) return size;
  }
  return 0;
}

}  // namespace

std::optional<ToolCall> ToolCallParser::ReadCall(std::string_view text) const {
  const std::string object(Trim(text));
  // The strict reader: depth and size are bounded, keys come once.
  const absl::StatusOr<Json> json = ParseJson(object);
  if (!json.ok() || !json->is_object()) return {};
  auto name = json->find("name");
  if (name == json->end()) name = json->find("function");
  if (name == json->end() || !name->is_string()) return {};
  const std::string& asked = name->get_ref<const std::string&>();
  if (std::find(functions_.begin(), functions_.end(), asked) == functions_.end()) return {};
  for (const char* key : {"arguments", "parameters"}) {
    const auto found = json->find(key);
    if (found == json->end()) continue;
    if (!found->is_object()) return {};
    const std::string_view written = MemberText(object, key);
    return ToolCall{asked, written.empty() ? found->dump() : std::string(written)};
  }
  return {};
}

std::vector<ToolCall> ToolCallParser::ReadAnswer(std::string_view text) const {
  std::vector<ToolCall> calls;
  text = Trim(text);
  if (text.starts_with(kPythonTag)) text = Trim(text.substr(kPythonTag.size()));
  while (!text.empty()) {
    const size_t size = text[0] == '{' ? BracketedSize(text) : 0;
    std::optional<ToolCall> call;
    if (size > 0) call = ReadCall(text.substr(0, size));
    if (!call) return {};
    calls.push_back(*std::move(call));
    text = Trim(text.substr(size));
    if (text.starts_with(';')) text = Trim(text.substr(1));
  }
  return calls;
}

void ToolCallParser::TakeText(size_t size, Found* found) {
  std::string_view text = std::string_view(held_).substr(0, size);
  if (after_call_) {
    const size_t begin = text.find_first_not_of(kSpace);
    if (begin == std::string_view::npos) return;
    after_call_ = false;
  }
  const size_t end = text.find_last_not_of(kSpace);
  if (end == std::string_view::npos) return;
  found->text += text.substr(0, end + 1);
  held_.erase(0, end + 1);
}

void ToolCallParser::Advance(Found* found) {
  for (;;) {
    if (state_ == State::kStart) {
      const std::string_view seen = Trim(held_);
      if (seen.empty() || (seen.size() < kPythonTag.size() && kPythonTag.starts_with(seen))) return;
      const bool whole = seen[0] == '{' || seen.starts_with(kPythonTag);
      state_ = whole ? State::kWholeAnswer : State::kText;
    } else if (state_ == State::kWholeAnswer) {
      return;
    } else if (state_ == State::kText) {
      const size_t open = held_.find(kOpen);
      if (open == std::string::npos) {
        return TakeText(held_.size() - PartialSize(held_, kOpen), found);
      }
      TakeText(open, found);
      const size_t left = held_.find(kOpen);
      gap_ = held_.substr(0, left);
      held_.erase(0, left);
      state_ = State::kCall;
    } else {
      const size_t close = held_.find(kClose);
      if (close == std::string::npos) return;
      const std::string_view inside =
          std::string_view(held_).substr(kOpen.size(), close - kOpen.size());
      if (std::optional<ToolCall> call = ReadCall(inside)) {
        found->calls.push_back(*std::move(call));
        after_call_ = true;
      } else {
        found->text += gap_ + held_.substr(0, close + kClose.size());
      }
      held_.erase(0, close + kClose.size());
      state_ = State::kText;
    }
  }
}

ToolCallParser::Found ToolCallParser::Push(std::string_view text) {
  held_ += text;
  Found found;
  Advance(&found);
  return found;
}

ToolCallParser::Found ToolCallParser::Finish() {
  Found found;
  if (state_ == State::kWholeAnswer) {
    found.calls = ReadAnswer(held_);
    if (found.calls.empty()) {
      // Perhaps of the other form after all.
      state_ = State::kText;
      Advance(&found);
    } else {
      held_.clear();
    }
  }
  if (state_ == State::kCall) {
    // Some models end without the closing tag.
    if (std::optional<ToolCall> call = ReadCall(std::string_view(held_).substr(kOpen.size()))) {
      found.calls.push_back(*std::move(call));
      held_.clear();
    } else {
      found.text += gap_;
    }
  }
  const bool space = after_call_ && Trim(held_).empty();
  if (!space) found.text += held_;
  held_.clear();
  return found;
}

}  // namespace lockstep
