// What both halves of the codec check and copy with. Private to wire/.
#ifndef LOCKSTEP_WIRE_CODEC_CHECKS_H_
#define LOCKSTEP_WIRE_CODEC_CHECKS_H_

#include <cmath>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep::wire::internal {

// Far above what any group runs: a message above them is not one of ours.
inline constexpr int kMaxSlots = 1 << 16;
inline constexpr int kMaxBlocks = 1 << 24;
inline constexpr int kMaxTokens = 1 << 22;  // of one sequence or one step
inline constexpr int kMaxLogprobs = 20;     // alternatives a token

inline absl::Status Bad(const std::string& field, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", what));
}

inline absl::Status CheckAtMost(const std::string& field, int64_t count, int64_t limit) {
  if (count <= limit) return absl::OkStatus();
  return Bad(field, absl::StrCat(count, " entries, at most ", limit));
}

inline absl::Status CheckFinite(const std::string& field, float value) {
  if (std::isfinite(value)) return absl::OkStatus();
  return Bad(field, "not a finite number");
}

inline absl::Status CheckBeside(const std::string& field, int count, const char* other,
                                int expected) {
  if (count == expected) return absl::OkStatus();
  return Bad(field, absl::StrCat(count, " beside ", expected, " ", other));
}

template <typename Ids, typename Out>
void AddIds(const Ids& ids, Out* out) {
  out->Reserve(out->size() + static_cast<int>(ids.size()));
  for (const auto& id : ids) out->AddAlreadyReserved(id.value);
}

}  // namespace lockstep::wire::internal

#define LOCKSTEP_RETURN_IF_ERROR(expr) \
  do {                                 \
    absl::Status status_ = (expr);     \
    if (!status_.ok()) return status_; \
  } while (false)

#endif  // LOCKSTEP_WIRE_CODEC_CHECKS_H_
