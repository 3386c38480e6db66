// `lockstep bench latency | prefill | throughput`: requests of fixed lengths,
// sent together to an otherwise idle server, and what came back when. The
// options are the flags; each function opens its target, measures, prints the
// report, and returns what went wrong.
#ifndef LOCKSTEP_CLI_BENCH_FIXED_BENCHES_H_
#define LOCKSTEP_CLI_BENCH_FIXED_BENCHES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "cli/bench/bench_target.h"

namespace lockstep {

// Time of a decode step with B sequences running together, from the streams:
// a request's time per token over the stretch in which all B were decoding,
// median over requests, median over runs.
struct LatencyFlags {
  BenchFlags bench;
  std::vector<uint32_t> batches = {1, 16, 64, 256};
  uint32_t context = 1024;  // prompt tokens
  uint32_t output = 160;    // tokens
};
absl::Status RunLatencyBench(const LatencyFlags& flags);

// Time to the first token of prompts that come together; of several, to the
// last one's first token.
struct PrefillFlags {
  BenchFlags bench;
  std::vector<std::string> cases = {"1x1024", "1x6144", "64x1024"};  // prompts x tokens
};
absl::Status RunPrefillBench(const PrefillFlags& flags);

// Output tokens a second when all requests come at once.
struct ThroughputFlags {
  BenchFlags bench;
  uint32_t requests = 512;
  uint32_t input = 1000, output = 1000;  // tokens
};
absl::Status RunThroughputBench(const ThroughputFlags& flags);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_FIXED_BENCHES_H_
