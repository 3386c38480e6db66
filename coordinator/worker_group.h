// The engine's view of a group of workers: plans go out, events come back. The
// gRPC implementation is coordinator/group/; tests use tests/fakes.
#ifndef LOCKSTEP_COORDINATOR_WORKER_GROUP_H_
#define LOCKSTEP_COORDINATOR_WORKER_GROUP_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "wire/step_plan.h"

namespace lockstep {

// A rank's memory, in bytes. Of parts that a backend cannot tell, nothing.
struct MemoryParts {
  uint64_t weights = 0, kv = 0;
  std::optional<uint64_t> activations = {}, communication = {}, runtime = {};

  // Nothing where a part is missing.
  std::optional<uint64_t> total() const {
    if (!activations || !communication || !runtime) return std::nullopt;
    return weights + kv + *activations + *communication + *runtime;
  }
};

struct RankReport {  // a rank's Hello and Ready, for GetModelInfo, logs and metrics
  uint32_t rank = 0;
  std::string host, device, collective_library, shard;
  uint32_t pid = 0;
  uint64_t checkpoint_bytes = 0;
  MemoryParts memory = {};                             // as allocated
  std::optional<MemoryParts> predicted = {};           // of the same sizes; nothing: not predicted
  std::vector<std::pair<std::string, double>> phases;  // name, seconds
};

struct GroupFormed {
  uint64_t epoch = 0;
  uint32_t num_kv_blocks = 0;  // the same in every epoch of a coordinator's life
  uint32_t max_num_seqs = 0;
  std::vector<RankReport> ranks;
};
struct GroupStep {    // every rank has answered and all agree (digest, collective count)
  StepResult result;  // rank 0's
  std::vector<StepTiming> timings;  // by rank
};
struct GroupFailed {
  uint64_t epoch = 0;
  int rank = -1;        // the root cause; -1: unknown
  absl::Status reason;  // Unavailable, one line naming the rank
  bool fatal = false;   // another epoch would fail the same way (bad checkpoint)
};
using GroupEvent = std::variant<GroupFormed, GroupStep, GroupFailed>;

// Thread-safe. Events are posted from any thread, at most one epoch at a time:
// GroupFormed(e), then GroupStep(e) in step order, then GroupFailed(e).
class WorkerGroup {
 public:
  using EventSink = std::function<void(GroupEvent)>;
  virtual ~WorkerGroup() = default;
  // Called once, before anything else.
  virtual void Start(EventSink sink) = 0;
  // Dropped silently when the plan's epoch is over.
  virtual void Send(const StepPlan& plan) = 0;
  // The engine found a lie in a result: end the epoch; answered by GroupFailed.
  virtual void FailEpoch(uint64_t epoch, const absl::Status& reason) = 0;
  // Tells the workers to exit cleanly. No events afterwards.
  virtual void Shutdown() = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_WORKER_GROUP_H_
