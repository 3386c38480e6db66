// What the measuring commands measure: a server that runs already, or one they
// start for as long as they run, and what is known of it.
#ifndef LOCKSTEP_CLI_BENCH_BENCH_TARGET_H_
#define LOCKSTEP_CLI_BENCH_BENCH_TARGET_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/statusor.h"
#include "cli/bench/floor.h"
#include "cli/local_server.h"
#include "cli/server_access.h"
#include "nlohmann/json.hpp"
#include "proto/inference.pb.h"

namespace lockstep {

struct BenchFlags {
  std::string server;   // host:port or unix:path
  ServerAccess access;  // to it
  std::string model;    // to serve; with `server`: where its config.json is, for the floor
  uint32_t tensor_parallel_size = 1;
  std::string backend, dtype, load_format, quantization, kv_cache_dtype;  // empty: as serve has it
  std::vector<std::string> serve_flags;                                   // after --
  std::string bandwidth, compute;  // of a rank; empty: the backend's
  uint32_t runs = 3;               // of each case, where the command has cases
  uint64_t seed = 0;               // 0: drawn
  bool json = false;
  std::string output;
  std::string server_log;  // where to keep what a server that was started here said
};

void AddBenchFlags(CLI::App* app, BenchFlags* flags);

struct BenchTarget {
  std::unique_ptr<LocalServer> local;  // null when `server` was given
  std::string address;
  ServerAccess access;  // none where it was started here
  v1::GetModelInfoResponse info;
  std::optional<Floor> floor;
  std::optional<std::string> quantization;  // "" or "fp8"; nothing: not known here
  double started_s = 0;  // from the start of `lockstep serve` until it answered; 0: it ran already
  uint64_t seed = 0;
};

// What a measurement needs of a server that is started for it.
struct ServerNeeds {
  uint32_t sequences = 0;  // at once
  uint32_t requests = 0;   // waiting or running
  uint32_t tokens = 0;     // of the longest sequence
};

// Starts or finds the server. Flags after -- win over those that `needs` adds.
absl::StatusOr<BenchTarget> OpenBenchTarget(const BenchFlags& flags, const ServerNeeds& needs);

// The server's own words on what cannot be measured against it: fewer
// sequences, tokens or KV blocks than `needs`. FailedPrecondition names the flag.
absl::Status CheckNeeds(const v1::GetModelInfoResponse& info, const ServerNeeds& needs);

// What every report says of its target.
nlohmann::ordered_json DescribeTarget(const BenchFlags& flags, const BenchTarget& target);
std::string TargetLine(const BenchTarget& target);
// A line that warns when `report` counts "cached_prompt_tokens"; empty otherwise.
std::string CachedLine(const nlohmann::ordered_json& report);

// Over what the file had; an empty path is none. The flag is for the error.
absl::Status WriteReportFile(const std::string& flag, const std::string& path,
                             const std::string& text);

// How a command reports: the table line by line as it is measured, so that a run
// that is cut short has said what it knew; the JSON at the end with --json, and
// in --output after every case. "complete" in it says whether all was measured.
class BenchOutput {
 public:
  explicit BenchOutput(const BenchFlags& flags) : flags_(flags) {}

  void Text(const std::string& text) const;  // nothing with --json
  // Before anything is measured: a file that cannot be written costs no measurement,
  // and what an earlier run left is not taken for this one's.
  absl::Status Begin() const;
  // What there is so far, over what was saved before.
  absl::Status Save(nlohmann::ordered_json report) const;
  // Saves, and prints with --json.
  absl::Status Finish(nlohmann::ordered_json report) const;

 private:
  const BenchFlags& flags_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_BENCH_TARGET_H_
