// From flags and a model directory to what the coordinator serves: the model's
// config, the shape every size follows from, and what each rank is told.
// Everything that makes a start impossible and can be known before a worker is
// there is found here, in one line that names the flag, file or field.
#ifndef LOCKSTEP_COORDINATOR_SERVING_PLAN_H_
#define LOCKSTEP_COORDINATOR_SERVING_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/group/group_options.h"
#include "coordinator/options.h"
#include "coordinator/scheduler.h"
#include "model/memory_model.h"
#include "model/model_config.h"

namespace lockstep {

struct ServingPlan {
  ModelConfig model;
  GenerationConfig generation;
  std::string served_name;
  BackendKind backend = BackendKind::kCpu;
  // max_num_seqs is a cap until the first group forms, where the flag is 0.
  ServingShape shape;
  // num_kv_blocks and max_num_seqs are filled in when the group forms; 0 for
  // max_queued_requests means 4 x max_num_seqs, at least 64.
  SchedulerConfig scheduler;
  std::vector<RankMemory> predicted;  // by rank
  uint64_t model_digest = 0;          // 0: there are no weights here
};

// `options` passed ValidateOptions.
absl::StatusOr<ServingPlan> PlanServing(const CoordinatorOptions& options);

// How the group's sizes follow from its workers' memory:
//
//   available   cuda: --gpu-memory-utilization of the GPU less what others use;
//               cpu: 60 % of the host's free memory over its ranks. The smallest.
//   sequences   the flag, or as many as fit at a quarter of max_model_len,
//               between 4 and 64 (cpu) or 256 (cuda)
//   KV blocks   the flag, or what fits; on cpu at most what that many sequences
//               of max_model_len can fill, and 4 GiB a rank beyond one sequence
absl::StatusOr<GroupSizes> SizeGroup(const ServingPlan& plan, const CoordinatorOptions& options,
                                     const std::vector<WorkerMemory>& workers);

// What each rank of a group of these sizes takes, by the memory model.
std::vector<MemoryParts> PredictGroup(const ServingPlan& plan, const GroupSizes& sizes);

// What GrpcWorkerGroup needs; it keeps copies of both arguments.
GroupOptions MakeGroupOptions(const ServingPlan& plan, const CoordinatorOptions& options);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_SERVING_PLAN_H_
