#include "model/json.h"

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "model/strings.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Builds a document from parse events. nlohmann's own builder accepts duplicate
// keys (the last wins) and any depth.
class DocumentBuilder : public nlohmann::json_sax<json> {
 public:
  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("unexpected binary value"); }
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    if (stack_.back()->contains(name)) {
      return Fail(absl::StrCat("duplicate key \"", Printable(name), "\""));
    }
    key_ = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const json::exception&) override {
    return Fail(absl::StrCat("not JSON at byte ", position));
  }

  json root;
  std::string error;

 private:
  bool Fail(std::string message) {
    if (error.empty()) error = std::move(message);
    return false;
  }

  json* Place(json value) {
    if (stack_.empty()) {
      root = std::move(value);
      return &root;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[std::exchange(key_, {})] = std::move(value));
  }

  bool Add(json value) {
    Place(std::move(value));
    return true;
  }

  bool Open(json container) {
    if (stack_.size() >= static_cast<size_t>(kMaxJsonDepth)) {
      return Fail(absl::StrCat("nested deeper than ", kMaxJsonDepth));
    }
    // An array may move its elements only while none of them is open, so the
    // pointers on the stack stay valid.
    stack_.push_back(Place(std::move(container)));
    return true;
  }

  bool Close() {
    stack_.pop_back();
    return true;
  }

  std::vector<json*> stack_;
  std::string key_;
};

}  // namespace

std::string Printable(std::string_view text) {
  constexpr size_t kMax = 64;
  const bool cut = text.size() > kMax;
  const std::string escaped = absl::CHexEscape(AbslView(text.substr(0, kMax)));
  return cut ? escaped + "..." : escaped;
}

std::string PrintableJson(const json& value) {
  if (value.is_string()) {
    return absl::StrCat("\"", Printable(value.get_ref<const std::string&>()), "\"");
  }
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  return Printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

absl::StatusOr<json> ParseJsonObject(std::string_view text, std::string_view where) {
  const auto bad = [&](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat(AbslView(where), ": ", AbslView(what)));
  };
  // The parser takes a NUL byte for the end of its input.
  if (text.find('\0') != text.npos) return bad("not JSON: has a NUL byte");
  DocumentBuilder builder;
  try {
    json::sax_parse(text.begin(), text.end(), &builder);
  } catch (const std::exception& e) {
    return bad(absl::StrCat("not JSON: ", Printable(e.what())));
  }
  if (!builder.error.empty()) return bad(builder.error);
  if (!builder.root.is_object()) return bad("not a JSON object");
  return std::move(builder.root);
}

}  // namespace lockstep
