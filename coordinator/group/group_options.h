// What a group is to be, and how patient its coordinator is. Times in
// milliseconds; tests shorten them.
#ifndef LOCKSTEP_COORDINATOR_GROUP_GROUP_OPTIONS_H_
#define LOCKSTEP_COORDINATOR_GROUP_GROUP_OPTIONS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/group/step_deadline.h"
#include "coordinator/worker_group.h"
#include "proto/worker.pb.h"
#include "wire/protocol.h"

namespace lockstep {

struct GroupTimeouts {
  int64_t hello_ms = 5'000;  // from a stream's start to its Hello
  int64_t heartbeat_interval_ms = wire::kHeartbeatIntervalMs;
  int64_t heartbeat_timeout_ms = wire::kHeartbeatTimeoutMs;
  int64_t load_stall_ms = 60'000;  // a load on which no rank makes progress
  // After a group that was whole is lost: a worker that cannot load is tried again, or another is,
  // for so long. Before it was whole such a failure is final at once.
  int64_t reload_ms = 60'000;
  int64_t release_ms = wire::kReleaseTimeoutMs + 500;  // CloseEpoch to Released
  // A failed collective is a symptom: what the cause turns out to be within
  // this time is named instead.
  int64_t symptom_ms = 100;
  StepDeadlineOptions step;
};

// A worker that is to hold a rank, as sizing sees it.
struct WorkerMemory {
  std::string host;
  std::string device_uuid;  // empty on cpu
  uint64_t total_bytes = 0, free_bytes = 0;
};

struct GroupSizes {
  uint32_t num_kv_blocks = 0;
  uint32_t max_num_seqs = 0;
};

struct GroupOptions {
  uint32_t tp_size = 1;
  std::string backend = "cpu";
  // Everything of Configure that does not depend on rank, epoch or memory.
  worker::v1::Configure configure;
  // Decides the sizes once, from the memory of the first group, by rank. An
  // error ends the start: no other workers would change it.
  std::function<absl::StatusOr<GroupSizes>(const std::vector<WorkerMemory>&)> size;
  // What the memory model says of a group of these sizes, by rank; may be empty.
  std::function<std::vector<MemoryParts>(const GroupSizes&)> predict;
  GroupTimeouts timeouts;
};

// Workers beyond tp_size that may wait as spares.
inline constexpr size_t kMaxSpareWorkers = 64;

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_GROUP_OPTIONS_H_
