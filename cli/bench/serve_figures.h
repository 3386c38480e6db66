// What one load point of `lockstep bench serve` says: rates, distributions,
// goodput, and the run over time. Pure: made of request logs.
#ifndef LOCKSTEP_CLI_BENCH_SERVE_FIGURES_H_
#define LOCKSTEP_CLI_BENCH_SERVE_FIGURES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "cli/bench/request_log.h"
#include "nlohmann/json.hpp"

namespace lockstep {

// A request is good when its first token came within ttft_ms of when it was due
// and its time per token is at most tpot_ms. A one-token answer has no TPOT.
struct ServiceLevel {
  double ttft_ms = 1000;
  double tpot_ms = 50;
};

// How the requests came: open loop at a Poisson rate (requests a second), or
// closed loop with so many under way.
struct LoadPoint {
  bool open = true;
  double value = 0;

  std::string Name() const;  // "2.5 req/s", "16 at once"
};

// Milliseconds, or seconds for whole requests.
struct Distribution {
  double mean = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
  std::vector<double> percentiles;  // 0, 2, ... 100: enough to draw it; none of no values

  static Distribution Of(const std::vector<double>& values);
};

struct ServeFigures {
  LoadPoint load;
  int64_t completed = 0;
  int64_t refused = 0;  // for want of room
  int64_t failed = 0;
  std::string first_failure;
  double seconds = 0;  // from the first request's due time to the last end
  int64_t prompt_tokens = 0, output_tokens = 0, cached_tokens = 0;  // of completed requests
  int64_t good = 0;                                                 // completed within the SLO
  Distribution ttft_ms, tpot_ms, gap_ms, latency_s;
  double late_ms = 0;  // 99th percentile of sent - due: the client's own lag
  // The run in equal slices.
  double slice_s = 0;
  std::vector<double> tokens_per_s, running;

  double requests_per_s() const { return PerSecond(completed); }
  double goodput_per_s() const { return PerSecond(good); }
  double output_per_s() const { return PerSecond(output_tokens); }
  double good_share() const;  // of all that were sent

 private:
  double PerSecond(int64_t n) const { return seconds > 0 ? static_cast<double>(n) / seconds : 0; }
};

ServeFigures Summarize(const LoadPoint& load, const std::vector<RequestLog>& logs,
                       const ServiceLevel& slo);

// Unavailable when requests failed or none was completed. Refusals beside answers
// are what overload measures.
absl::Status Verdict(const ServeFigures& figures);

// A distribution of nothing is null.
nlohmann::ordered_json ToJson(const ServeFigures& figures);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_SERVE_FIGURES_H_
