// A profile's parts, gathered from every rank and checked, and the trace they
// make: the JSON that Chrome's and Perfetto's viewers read, one process a rank,
// all on one time axis. Not thread-safe.
//
//   steps         when each step ran, and what its time went on (args)
//   time by kind  each step's sums laid end to end: how much, not when
//   stream N      kernels and copies, where the device can be traced
#ifndef LOCKSTEP_COORDINATOR_GROUP_PROFILE_TRACE_H_
#define LOCKSTEP_COORDINATOR_GROUP_PROFILE_TRACE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/worker.pb.h"

namespace lockstep {

struct ProfiledRank {
  std::string name;      // "rank 0 (host:pid, device)"
  int64_t clock_ns = 0;  // what its clock lacks to the coordinator's
};

class ProfileTrace {
 public:
  ProfileTrace(uint64_t id, uint32_t steps, std::vector<ProfiledRank> ranks);

  uint64_t id() const { return id_; }
  // Parts of other profiles are passed over. InvalidArgument, one line naming
  // the rank: bounds, order or indices are broken.
  absl::Status Add(uint32_t rank, const worker::v1::ProfilePart& part);
  bool complete() const { return num_complete_ == ranks_.size(); }
  // That every rank has.
  size_t num_steps() const;
  // After complete().
  std::string Json() const;

 private:
  struct Rank {
    ProfiledRank about;
    std::vector<worker::v1::ProfilePart> parts;
    size_t num_steps = 0, num_events = 0;
    uint64_t last_end_ns = 0;
    bool complete = false;
  };

  const uint64_t id_;
  const uint32_t steps_;
  std::vector<Rank> ranks_;
  size_t num_complete_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_PROFILE_TRACE_H_
