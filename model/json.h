// JSON from files that nobody vouches for: bounded depth, no duplicate keys, no
// exceptions, and one-line errors that say where.
#ifndef LOCKSTEP_MODEL_JSON_H_
#define LOCKSTEP_MODEL_JSON_H_

#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace lockstep {

constexpr int kMaxJsonDepth = 64;
constexpr int64_t kMaxConfigBytes = 8 << 20;

// An object, whole. InvalidArgument, starting with `where`, for anything that
// is not exactly one JSON object. The caller bounds the length of `text`.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, std::string_view where);

// What may be echoed in an error: at most 64 bytes, with control characters,
// quotes and non-ASCII bytes escaped.
std::string Printable(std::string_view text);

// Printable, of a value.
std::string PrintableJson(const nlohmann::json& value);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_JSON_H_
