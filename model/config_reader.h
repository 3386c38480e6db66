// Reads typed fields of a JSON object and remembers which were read, so that
// what was not read can be refused. Errors are sticky: the first one wins, later
// reads return their fallback, and status() tells at the end. A family's reader
// can then be a plain list of assignments.
//
//   ConfigReader reader(object, "config.json", "");
//   config.hidden_size = reader.Int("hidden_size", std::nullopt, 1, kMaxHidden);
//   reader.RefuseUnread(IsHarmless);
//   return reader.status();
#ifndef LOCKSTEP_MODEL_CONFIG_READER_H_
#define LOCKSTEP_MODEL_CONFIG_READER_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace lockstep {

class ConfigReader {
 public:
  // `prefix` ("rope_scaling.") goes before field names in errors. `object`
  // outlives the reader.
  ConfigReader(const nlohmann::json& object, std::string where, std::string prefix);

  // In the object at all; with a value other than null.
  bool Has(std::string_view key) const;
  bool HasValue(std::string_view key) const;

  // A missing or null field gives the fallback; without one that is an error.
  int64_t Int(std::string_view key, std::optional<int64_t> fallback, int64_t min, int64_t max);
  double Number(std::string_view key, std::optional<double> fallback, double above, double max);
  bool Bool(std::string_view key, bool fallback);
  std::string String(std::string_view key, std::string_view fallback);
  std::vector<std::string> Strings(std::string_view key);
  // A token id, a list of them, or nothing.
  std::vector<uint32_t> TokenIds(std::string_view key);
  // Null when missing or null; must be an object.
  const nlohmann::json* Object(std::string_view key);

  // The field may only have this value (or be missing or null): anything else
  // would change the maths in a way that is not implemented.
  void RequireBool(std::string_view key, bool value);
  void RequireNull(std::string_view key, std::string_view why);
  void RequireNumber(std::string_view key, double value);

  // Marks a field as dealt with.
  void Ignore(std::string_view key);
  // Refuses by name every field that was neither read, nor harmless, nor empty
  // (null, false, "", [] or {}).
  void RefuseUnread(bool (*harmless)(std::string_view key));

  // "where: field NAME REST", as InvalidArgument or Unimplemented.
  void FailInvalid(std::string_view key, std::string_view rest);
  void FailUnsupported(std::string_view key, std::string_view rest);
  void Fail(absl::Status status);

  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }
  const std::string& where() const { return where_; }

 private:
  // Marks as read; null when missing or null.
  const nlohmann::json* Read(std::string_view key);
  std::string Describe(std::string_view key, std::string_view rest) const;

  const nlohmann::json& object_;
  const std::string where_;
  const std::string prefix_;
  std::set<std::string, std::less<>> read_;
  absl::Status status_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_CONFIG_READER_H_
