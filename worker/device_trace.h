// What a worker's device ran and when, where something can tell (CUPTI). Asked
// only while a profile runs. Of the runner's thread.
#ifndef LOCKSTEP_WORKER_DEVICE_TRACE_H_
#define LOCKSTEP_WORKER_DEVICE_TRACE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lockstep {

struct DeviceEvent {
  std::string name;
  uint64_t begin_ns = 0, end_ns = 0;  // of the host's monotonic clock
  uint32_t stream = 0;
  uint32_t blocks = 0;   // thread blocks; 0: a copy
  uint32_t threads = 0;  // of one block
};

class DeviceTrace {
 public:
  virtual ~DeviceTrace() = default;
  // The device is idle at both.
  virtual absl::Status Start() = 0;
  // In order of their beginnings.
  virtual absl::StatusOr<std::vector<DeviceEvent>> Stop() = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_DEVICE_TRACE_H_
