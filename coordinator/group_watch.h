// What an operator may see of a group while it runs: figures of the ranks'
// devices, and a profile of its steps. Thread-safe. The implementation over gRPC
// is coordinator/group/.
#ifndef LOCKSTEP_COORDINATOR_GROUP_WATCH_H_
#define LOCKSTEP_COORDINATOR_GROUP_WATCH_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

// The last that a rank's driver said; empty where it does not.
struct DeviceFigures {
  uint32_t rank = 0;
  std::optional<double> sm_active, dram_active;  // 0 to 1
  std::optional<double> nvlink_tx_bytes_per_second, nvlink_rx_bytes_per_second;
  std::optional<double> memory_used_bytes;
  std::optional<double> sm_clock_hertz, memory_clock_hertz;
  std::optional<double> power_watts, temperature_celsius;
  std::optional<double> throttle_reasons;  // NVML's bits
};

class GroupWatch {
 public:
  virtual ~GroupWatch() = default;
  // Of the ranks of a whole group that said anything.
  virtual std::vector<DeviceFigures> Devices() = 0;
  // Traces the next `steps` steps of every rank; blocks until they have run, or
  // what there was of them after timeout_ms. A Chrome / Perfetto trace.
  // Unavailable: no whole group, or its epoch ended. FailedPrecondition: a
  // profile is running. DeadlineExceeded: not one step. Cancelled: `cancelled`,
  // which is asked a few times a second, said so.
  virtual absl::StatusOr<std::string> Profile(uint32_t steps, int64_t timeout_ms,
                                              const std::function<bool()>& cancelled) = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_WATCH_H_
