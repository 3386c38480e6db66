#include "coordinator/api/trace.h"

#include <algorithm>
#include <cstddef>
#include <string>

#include "common/log.h"

namespace lockstep {
namespace {

constexpr size_t kSize = 55;  // of version 00
constexpr size_t kMaxSize = 128;

bool IsHex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZero(std::string_view text) { return text.find_first_not_of('0') == std::string_view::npos; }

}  // namespace

bool IsTraceparent(std::string_view value) {
  if (value.size() < kSize || value.size() > kMaxSize) return false;
  const std::string_view version = value.substr(0, 2), trace = value.substr(3, 32),
                         parent = value.substr(36, 16), flags = value.substr(53, 2);
  if (value[2] != '-' || value[35] != '-' || value[52] != '-') return false;
  if (!IsHex(version) || !IsHex(trace) || !IsHex(parent) || !IsHex(flags)) return false;
  if (version == "ff" || IsZero(trace) || IsZero(parent)) return false;
  return version == "00" ? value.size() == kSize : value.size() == kSize || value[kSize] == '-';
}

void LogTrace(std::string_view request_id, std::string_view traceparent) {
  if (!IsTraceparent(traceparent)) {
    Log(LogLevel::kDebug, "request", {{"request_id", request_id}});
    return;
  }
  Log(LogLevel::kInfo, "request", {{"request_id", request_id}, {"traceparent", traceparent}});
}

}  // namespace lockstep
