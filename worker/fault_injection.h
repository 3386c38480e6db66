// Faults on request, for tests of the whole system: `lockstep-worker --inject
// SPEC` alone turns them on. SPEC is a list of faults parted by ';', each a name,
// '@' and conditions parted by ',':
//
//   exit@phase=load          ends the process (exit code 86) when loading begins;
//                            phases: load, communicator (rank has joined), kv
//   hang@step=4              step 4 of an epoch never returns (the process lives,
//                            heartbeats go on); likewise hang@phase=...
//   skip_collective@step=3   leaves out that step's first all-reduce (on GPUs of a step
//                            that is no replay of a graph, as one with a prompt)
//   lie_token@step=3         reports another token than was sampled, at rank 0
//   lie_digest@step=3        reports another digest
//   poison@token=7           reports NaN logits for a sequence whose prompt has 7
//   die@token=7              ends the process when a prompt has token 7
//   slow@ms=20               every step takes that much longer
//   fail@step=3              the step returns an error
//   no_peers@phase=communicator   GPUs do not use each other's memory: NCCL carries
//                            every collective; on all ranks and in all epochs
//
// With `epoch=N` as a further condition a fault waits for that epoch; `rank=R`
// limits it to one rank.
#ifndef LOCKSTEP_WORKER_FAULT_INJECTION_H_
#define LOCKSTEP_WORKER_FAULT_INJECTION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/rank_communicator.h"
#include "worker/model_host.h"

namespace lockstep {

struct Fault {
  std::string name;
  std::string phase;
  std::optional<uint64_t> step, token, ms, epoch, rank;
};

// InvalidArgument names the part that is not understood.
absl::StatusOr<std::vector<Fault>> ParseFaults(const std::string& spec);

// Wraps a host and the making of communicators so that the faults happen.
// `host` is returned as it is where there are none.
using MakeCommunicator =
    std::function<std::unique_ptr<RankCommunicator>(const CommunicatorOptions&)>;
std::unique_ptr<ModelHost> InjectFaults(std::vector<Fault> faults, std::unique_ptr<ModelHost> host,
                                        MakeCommunicator* make_communicator);

inline constexpr int kInjectedExitCode = 86;

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_FAULT_INJECTION_H_
