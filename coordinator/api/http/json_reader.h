// JSON from clients, read strictly: bounded nesting and size, duplicate keys,
// NaN, Infinity and invalid UTF-8 refused, every field accounted for.
//
//   absl::StatusOr<Json> body = ParseJson(text);
//   FieldReader fields(*body);
//   request.temperature = fields.Real("temperature");
//   if (absl::Status s = fields.Finish(); !s.ok()) return s;   // wrong type, unknown field
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_JSON_READER_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_JSON_READER_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/ids.h"

namespace lockstep {

using Json = nlohmann::json;

// InvalidArgument says where in the text; for a duplicate key, which.
absl::StatusOr<Json> ParseJson(const std::string& text);

// A JSON value as an error shows it: cut at 64 characters.
std::string EchoJson(const Json& value);

// Reads the fields of one object. Absent and null are the same. The first
// error stays, and everything read after it is empty.
class FieldReader {
 public:
  // `where` goes before field names: "stream_options." for a nested object.
  explicit FieldReader(const Json& object, std::string where = "");

  std::optional<bool> Bool(const char* name);
  // A whole number; 16.0 counts as one.
  std::optional<int64_t> Integer(const char* name);
  std::optional<double> Real(const char* name);
  std::optional<std::string> String(const char* name);
  // Printable ASCII of at most 128 bytes.
  std::optional<std::string> Identifier(const char* name);
  // Token ids: whole numbers in the range of int64.
  std::vector<int64_t> Integers(const char* name);
  // The value itself, marked as read; nullptr when absent or null.
  const Json* Raw(const char* name);

  void Fail(absl::Status status);
  const absl::Status& status() const { return status_; }
  // The first error, or the first field that nobody read.
  absl::Status Finish();

 private:
  void FailType(const char* name, const char* expected, const Json& value);

  const Json& object_;
  const std::string where_;
  std::set<std::string, std::less<>> read_;
  absl::Status status_;
};

// `value` as a whole number; 16.0 counts as one. Nothing for other types and
// what int64 cannot hold.
std::optional<int64_t> AsInteger(const Json& value);

// An array of token ids. Errors name `field` and the index.
absl::StatusOr<std::vector<TokenId>> ReadTokenIds(const Json& array, std::string_view field);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_JSON_READER_H_
