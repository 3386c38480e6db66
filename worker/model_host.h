// What a worker hosts: one rank's share of a model. The session tells it when
// to load, when an epoch begins and ends, and what to compute; it knows nothing
// of streams. Weights outlive epochs: a Load that asks for what is already there
// returns at once.
//
//   Load -> Begin -> Submit, Collect ... -> End -> [Load ->] Begin -> ...
//
// Calls come from one thread, but where said otherwise.
#ifndef LOCKSTEP_WORKER_MODEL_HOST_H_
#define LOCKSTEP_WORKER_MODEL_HOST_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/worker.pb.h"
#include "wire/step_plan.h"
#include "worker/comm/communicator.h"

namespace lockstep {

struct LoadReport {
  uint64_t weight_bytes = 0;      // resident
  uint64_t checkpoint_bytes = 0;  // read from files by this Load
  uint64_t kv_bytes = 0;
  std::optional<uint64_t> activation_bytes, runtime_bytes;  // where the backend says
  uint64_t shared_bytes = 0;                                // CommunicatorOptions'
  uint64_t model_digest = 0;                                // ranks of a group must agree on it
  std::string shard;                                        // in words
  std::vector<std::pair<std::string, double>> phases;       // name, seconds
};

class ModelHost {
 public:
  // Bytes of weights in memory so far, and in the end.
  using Progress = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

  virtual ~ModelHost() = default;
  // `configure` has passed CheckConfigure. Errors name the file, tensor or
  // field; the same call would fail again, except after Unavailable.
  virtual absl::StatusOr<LoadReport> Load(const worker::v1::Configure& configure,
                                          const Progress& progress) = 0;
  // No slots, an empty KV cache. `comm` outlives the epoch.
  virtual absl::Status Begin(uint64_t epoch, Communicator* comm) = 0;
  // As StepExecutor's.
  virtual absl::Status Submit(const StepPlan& plan, uint64_t plan_received_ns) = 0;
  virtual bool Done() = 0;
  virtual absl::StatusOr<StepResult> Collect() = 0;
  // Lets go of the communicator. Also after a failed Load or Begin. False: what
  // it computes on does not let go; the process is of no more use.
  virtual bool End() = 0;
  // The rank whose weights are in memory; -1: none. From any thread.
  virtual int loaded_rank() const = 0;
  // Memory that a next Load would reuse or free. From any thread.
  virtual uint64_t held_bytes() const = 0;
};

// What can be refused of a Configure before anything is opened: names the field.
absl::Status CheckConfigure(const worker::v1::Configure& configure);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_MODEL_HOST_H_
