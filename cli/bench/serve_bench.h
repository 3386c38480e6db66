// `lockstep bench serve`: a server under a load like its users', at one or
// several points, judged by a service level.
#ifndef LOCKSTEP_CLI_BENCH_SERVE_BENCH_H_
#define LOCKSTEP_CLI_BENCH_SERVE_BENCH_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "cli/bench/bench_target.h"
#include "cli/bench/serve_figures.h"

namespace lockstep {

struct ServeBenchFlags {
  BenchFlags bench;
  std::vector<double> rates;          // open loop: requests a second, one point each
  std::vector<uint32_t> concurrency;  // closed loop: requests under way, one point each
  std::optional<uint32_t> requests;   // a point; nothing: as many as the loads need
  std::string lengths = "fixed";      // fixed, sharegpt
  uint32_t input = 256, output = 128;
  ServiceLevel slo;
  std::string html;
};

// Open loop: requests are due at the times of a Poisson process and latencies
// count from then, so that a client or server that falls behind shows.
absl::Status RunServeBench(const ServeBenchFlags& flags);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_SERVE_BENCH_H_
