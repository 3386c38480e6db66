#include "coordinator/api/http/json_reader.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/limits.h"
#include "coordinator/text/utf8.h"

namespace lockstep {
namespace {

// `text` as valid UTF-8, which what the parser stumbled over need not be.
std::string Shown(const std::string& text) {
  if (IsValidUtf8(text)) return text;
  std::string shown;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80) {
      shown += c;
    } else {
      absl::StrAppend(&shown, "\\x", absl::Hex(byte));
    }
  }
  return shown;
}

// Builds the value while the limits hold; a false return ends the parse.
class StrictBuilder : public nlohmann::json_sax<Json> {
 public:
  Json& result() { return result_; }
  const absl::Status& status() const { return status_; }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    // "1e999" reads as infinity.
    if (!std::isfinite(value)) return Fail(absl::StrCat("number ", Echo(text), " is too large"));
    return Add(value);
  }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("binary values are not JSON"); }

  bool start_object(std::size_t) override { return Open(Json::object()); }
  bool start_array(std::size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) {
      status_ = FieldError(Echo(name), absl::StrCat("the key '", Echo(name), "' appears twice"));
      return false;
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string& last_token,
                   const nlohmann::detail::exception&) override {
    return Fail(
        absl::StrCat("not JSON at byte ", position, ", near '", Echo(Shown(last_token)), "'"));
  }

 private:
  bool Fail(const std::string& what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat("body: ", what));
    return false;
  }
  bool Open(Json container) {
    if (open_.size() >= limits::kJsonDepth) {
      return Fail(absl::StrCat("nested deeper than ", limits::kJsonDepth));
    }
    Json* const added = Place(std::move(container));
    if (added == nullptr) return false;
    open_.push_back(added);
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }
  bool Add(Json value) { return Place(std::move(value)) != nullptr; }
  Json* Place(Json value) {
    if (++count_ > limits::kJsonValues) {
      Fail(absl::StrCat("more than ", limits::kJsonValues, " values"));
      return nullptr;
    }
    if (open_.empty()) {
      result_ = std::move(value);
      return &result_;
    }
    // The parent stays where it is while its child is open: only the innermost
    // container grows.
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }

  Json result_;
  std::vector<Json*> open_;
  std::string key_;
  size_t count_ = 0;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<Json> ParseJson(const std::string& text) {
  if (text.empty()) return absl::InvalidArgumentError("body: empty; send a JSON object");
  // The parser takes a NUL byte for the end of its input.
  if (const size_t nul = text.find('\0'); nul != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("body: not JSON at byte ", nul, ": a NUL byte"));
  }
  StrictBuilder builder;
  if (Json::sax_parse(text, &builder)) return std::move(builder.result());
  if (!builder.status().ok()) return builder.status();
  return absl::InvalidArgumentError("body: not JSON");
}

std::string EchoJson(const Json& value) {
  // A large value is not written out to be cut.
  if (value.is_array()) return "an array";
  if (value.is_object()) return "an object";
  if (value.is_string()) {
    return absl::StrCat("\"", Echo(value.get_ref<const std::string&>()), "\"");
  }
  return Echo(value.dump());
}

std::optional<int64_t> AsInteger(const Json& value) {
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    return number <= kMax ? std::optional(static_cast<int64_t>(number)) : std::nullopt;
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const auto number = value.get<double>();
    // Up to where doubles count one by one.
    if (number == std::floor(number) && std::abs(number) <= 9007199254740992.0) {
      return static_cast<int64_t>(number);
    }
  }
  return {};
}

absl::StatusOr<std::vector<TokenId>> ReadTokenIds(const Json& array, std::string_view field) {
  std::vector<TokenId> ids;
  ids.reserve(array.size());
  for (const Json& value : array) {
    const std::optional<int64_t> id = AsInteger(value);
    if (!id || *id < 0 || *id > std::numeric_limits<TokenId>::max()) {
      return FieldError(field, absl::StrCat("index ", ids.size(), ": expected a token id, got ",
                                            EchoJson(value)));
    }
    ids.push_back(static_cast<TokenId>(*id));
  }
  return ids;
}

FieldReader::FieldReader(const Json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  if (!object.is_object()) {
    const std::string name = where_.empty() ? "body" : where_.substr(0, where_.size() - 1);
    const std::string what = absl::StrCat("expected an object, got ", EchoJson(object));
    status_ = where_.empty() ? absl::InvalidArgumentError(absl::StrCat(name, ": ", what))
                             : FieldError(name, what);
  }
}

const Json* FieldReader::Raw(const char* name) {
  if (!status_.ok()) return nullptr;
  read_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<bool> FieldReader::Bool(const char* name) {
  const Json* const value = Raw(name);
  if (value == nullptr) return {};
  if (value->is_boolean()) return value->get<bool>();
  FailType(name, "true or false", *value);
  return {};
}

std::optional<int64_t> FieldReader::Integer(const char* name) {
  const Json* const value = Raw(name);
  if (value == nullptr) return {};
  const std::optional<int64_t> number = AsInteger(*value);
  if (!number) FailType(name, "a whole number", *value);
  return number;
}

std::optional<double> FieldReader::Real(const char* name) {
  const Json* const value = Raw(name);
  if (value == nullptr) return {};
  if (value->is_number()) return value->get<double>();
  FailType(name, "a number", *value);
  return {};
}

std::optional<std::string> FieldReader::String(const char* name) {
  const Json* const value = Raw(name);
  if (value == nullptr) return {};
  if (value->is_string()) return value->get<std::string>();
  FailType(name, "a string", *value);
  return {};
}

std::optional<std::string> FieldReader::Identifier(const char* name) {
  std::optional<std::string> value = String(name);
  if (!value) return {};
  absl::Status status = CheckIdentifier(absl::StrCat(where_, name), *value);
  if (status.ok()) return value;
  Fail(std::move(status));
  return {};
}

std::vector<int64_t> FieldReader::Integers(const char* name) {
  const Json* const value = Raw(name);
  if (value == nullptr) return {};
  std::vector<int64_t> numbers;
  if (!value->is_array()) {
    FailType(name, "an array of token ids", *value);
    return {};
  }
  for (const Json& element : *value) {
    const std::optional<int64_t> number = AsInteger(element);
    if (!number) {
      FailType(name, "an array of token ids", element);
      return {};
    }
    numbers.push_back(*number);
  }
  return numbers;
}

void FieldReader::Fail(absl::Status status) {
  if (status_.ok()) status_ = std::move(status);
}

void FieldReader::FailType(const char* name, const char* expected, const Json& value) {
  Fail(FieldError(absl::StrCat(where_, name),
                  absl::StrCat("expected ", expected, ", got ", EchoJson(value))));
}

absl::Status FieldReader::Finish() {
  if (!status_.ok()) return status_;
  for (const auto& [name, value] : object_.items()) {
    if (read_.contains(name)) continue;
    const std::string field = absl::StrCat(where_, Echo(name));
    return FieldError(field, "unknown field");
  }
  return absl::OkStatus();
}

}  // namespace lockstep
