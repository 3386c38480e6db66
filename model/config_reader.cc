#include "model/config_reader.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/json.h"
#include "model/strings.h"

namespace lockstep {

using nlohmann::json;

ConfigReader::ConfigReader(const json& object, std::string where, std::string prefix)
    : object_(object), where_(std::move(where)), prefix_(std::move(prefix)) {}

bool ConfigReader::Has(std::string_view key) const {
  return object_.find(std::string(key)) != object_.end();
}

bool ConfigReader::HasValue(std::string_view key) const {
  const auto it = object_.find(std::string(key));
  return it != object_.end() && !it->is_null();
}

const json* ConfigReader::Read(std::string_view key) {
  read_.emplace(key);
  const auto it = object_.find(std::string(key));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

int64_t ConfigReader::Int(std::string_view key, std::optional<int64_t> fallback, int64_t min,
                          int64_t max) {
  const json* value = Read(key);
  if (value == nullptr) {
    if (!fallback.has_value()) FailInvalid(key, "is missing");
    return fallback.value_or(min);
  }
  // A value above 2^63 is unsigned in the document and fails the range here.
  const bool in_range = value->is_number_unsigned()
                            ? max >= 0 && value->get<uint64_t>() <= static_cast<uint64_t>(max) &&
                                  (min <= 0 || value->get<uint64_t>() >= static_cast<uint64_t>(min))
                            : value->is_number_integer() && value->get<int64_t>() >= min &&
                                  value->get<int64_t>() <= max;
  if (!in_range) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected a whole number from ",
                                  min, " to ", max));
    return fallback.value_or(min);
  }
  return value->get<int64_t>();
}

double ConfigReader::Number(std::string_view key, std::optional<double> fallback, double above,
                            double max) {
  const json* value = Read(key);
  if (value == nullptr) {
    if (!fallback.has_value()) FailInvalid(key, "is missing");
    return fallback.value_or(max);
  }
  if (!value->is_number() || !(value->get<double>() > above) || !(value->get<double>() <= max)) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected a number above ", above,
                                  " and at most ", max));
    return fallback.value_or(max);
  }
  return value->get<double>();
}

bool ConfigReader::Bool(std::string_view key, bool fallback) {
  const json* value = Read(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected true or false"));
    return fallback;
  }
  return value->get<bool>();
}

std::string ConfigReader::String(std::string_view key, std::string_view fallback) {
  const json* value = Read(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected a string"));
    return std::string(fallback);
  }
  return value->get<std::string>();
}

std::vector<std::string> ConfigReader::Strings(std::string_view key) {
  const json* value = Read(key);
  std::vector<std::string> strings;
  if (value == nullptr) return strings;
  if (!value->is_array()) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected a list of strings"));
    return strings;
  }
  for (const json& item : *value) {
    if (!item.is_string()) {
      FailInvalid(key, absl::StrCat("has ", PrintableJson(item), "; expected strings"));
      return {};
    }
    strings.push_back(item.get<std::string>());
  }
  return strings;
}

std::vector<uint32_t> ConfigReader::TokenIds(std::string_view key) {
  const json* value = Read(key);
  std::vector<uint32_t> ids;
  if (value == nullptr) return ids;
  const auto add = [&](const json& item) {
    if (!item.is_number_unsigned() || item.get<uint64_t>() > INT32_MAX) {
      FailInvalid(key, absl::StrCat("is ", PrintableJson(item), "; expected a token id"));
      return;
    }
    ids.push_back(item.get<uint32_t>());
  };
  if (value->is_array()) {
    for (const json& item : *value) add(item);
  } else {
    add(*value);
  }
  return ids;
}

const json* ConfigReader::Object(std::string_view key) {
  const json* value = Read(key);
  if (value != nullptr && !value->is_object()) {
    FailInvalid(key, absl::StrCat("is ", PrintableJson(*value), "; expected an object"));
    return nullptr;
  }
  return value;
}

void ConfigReader::RequireBool(std::string_view key, bool required) {
  if (Bool(key, required) != required) {
    FailUnsupported(
        key, required ? "is false; only true is supported" : "is true; only false is supported");
  }
}

void ConfigReader::RequireNull(std::string_view key, std::string_view why) {
  if (const json* value = Read(key); value != nullptr) {
    FailUnsupported(key, absl::StrCat("is ", PrintableJson(*value), "; ", AbslView(why)));
  }
}

void ConfigReader::RequireNumber(std::string_view key, double required) {
  const json* value = Read(key);
  if (value != nullptr && !(value->is_number() && value->get<double>() == required)) {
    FailUnsupported(
        key, absl::StrCat("is ", PrintableJson(*value), "; only ", required, " is supported"));
  }
}

void ConfigReader::Ignore(std::string_view key) { read_.emplace(key); }

void ConfigReader::RefuseUnread(bool (*harmless)(std::string_view key)) {
  for (const auto& [key, value] : object_.items()) {
    const bool empty = value.empty() || value == json(false) || value == json("");
    if (empty || read_.contains(key) || harmless(key)) continue;
    FailUnsupported(key, absl::StrCat("is ", PrintableJson(value),
                                      "; this field is not known, so what it would change is not "
                                      "implemented"));
    return;
  }
}

std::string ConfigReader::Describe(std::string_view key, std::string_view rest) const {
  return absl::StrCat(where_, ": field ", prefix_, Printable(key), " ", AbslView(rest));
}

void ConfigReader::FailInvalid(std::string_view key, std::string_view rest) {
  Fail(absl::InvalidArgumentError(Describe(key, rest)));
}

void ConfigReader::FailUnsupported(std::string_view key, std::string_view rest) {
  Fail(absl::UnimplementedError(Describe(key, rest)));
}

void ConfigReader::Fail(absl::Status status) {
  if (status_.ok()) status_ = std::move(status);
}

}  // namespace lockstep
