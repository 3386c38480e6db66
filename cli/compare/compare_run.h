// `lockstep compare`: a prompt set through two configurations, in turn. Each is
// a server that runs already or flags to start one with; only one that is
// started here runs at a time, so that both may want all of the machine.
#ifndef LOCKSTEP_CLI_COMPARE_COMPARE_RUN_H_
#define LOCKSTEP_CLI_COMPARE_COMPARE_RUN_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "cli/server_access.h"

namespace lockstep {

struct CompareSide {
  std::string server;  // address; empty: one is started
  std::string flags;   // of `lockstep serve`, as one would type them
};

struct CompareFlags {
  CompareSide a, b;
  ServerAccess access;  // to the sides that run already
  std::string model;    // for the sides that are started and name none of their own
  std::string prompts;  // JSON lines as `lockstep batch` reads them; empty: random tokens
  uint32_t random_prompts = 16, random_tokens = 64;
  uint32_t max_tokens = 32;         // of an answer
  uint32_t top = 20;                // log-probabilities a position
  std::optional<double> max_error;  // an error beyond it fails; without: report only
  uint64_t seed = 1;                // of the random prompts
  bool json = false;
  std::string output;
};

// FailedPrecondition when --max-error is given and exceeded; the report is
// printed first.
absl::Status RunCompare(const CompareFlags& flags);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_COMPARE_COMPARE_RUN_H_
