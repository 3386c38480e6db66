#include "cli/bench/request_log.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

absl::Status RequestLog::Outcome() const {
  if (!status.ok()) return status;
  if (arrivals.empty()) return absl::DataLossError("the answer had no tokens");
  if (asked_tokens != 0 && output_tokens != asked_tokens) {
    return absl::DataLossError(
        absl::StrCat("the answer had ", output_tokens, " tokens of ", asked_tokens));
  }
  return absl::OkStatus();
}

double RequestLog::first_token_s() const { return Seconds(arrivals.front().ns - due_ns); }

double RequestLog::latency_s() const { return Seconds(arrivals.back().ns - due_ns); }

std::optional<double> RequestLog::per_token_s() const {
  return PerTokenWithin(*this,
                        {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()});
}

TimeWindow AllRunning(const std::vector<RequestLog>& logs) {
  TimeWindow window{std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
  for (const RequestLog& log : logs) {
    if (!log.ok()) continue;
    window.begin_ns = std::max(window.begin_ns, log.arrivals.front().ns);
    window.end_ns = std::min(window.end_ns, log.arrivals.back().ns);
  }
  if (window.end_ns <= window.begin_ns || window.end_ns == std::numeric_limits<int64_t>::max()) {
    return {};
  }
  return window;
}

std::optional<double> PerTokenWithin(const RequestLog& log, const TimeWindow& window) {
  const TokenArrival* first = nullptr;
  const TokenArrival* last = nullptr;
  uint64_t after_first = 0;
  for (const TokenArrival& arrival : log.arrivals) {
    if (arrival.ns < window.begin_ns || arrival.ns > window.end_ns) continue;
    if (first == nullptr) {
      first = &arrival;
    } else {
      after_first += arrival.tokens;
    }
    last = &arrival;
  }
  if (after_first == 0) return std::nullopt;
  return Seconds(last->ns - first->ns) / static_cast<double>(after_first);
}

std::vector<double> GapsWithin(const std::vector<RequestLog>& logs, const TimeWindow& window) {
  std::vector<double> gaps;
  for (const RequestLog& log : logs) {
    for (size_t i = 1; i < log.arrivals.size(); ++i) {
      const int64_t from = log.arrivals[i - 1].ns, to = log.arrivals[i].ns;
      if (from >= window.begin_ns && to <= window.end_ns) gaps.push_back(Seconds(to - from));
    }
  }
  return gaps;
}

absl::Status FirstFailure(const std::vector<RequestLog>& logs) {
  for (size_t i = 0; i < logs.size(); ++i) {
    const absl::Status outcome = logs[i].Outcome();
    if (!outcome.ok()) {
      return absl::Status(outcome.code(), absl::StrCat("request ", i, " of ", logs.size(), ": ",
                                                       std::string(outcome.message())));
    }
  }
  return absl::OkStatus();
}

}  // namespace lockstep
