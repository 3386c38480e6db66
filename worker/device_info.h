// What a worker says of the machine it is on, as far as the cpu backend cares.
// Reads /proc, /sys and the scheduler's mask; never fails, but says less.
#ifndef LOCKSTEP_WORKER_DEVICE_INFO_H_
#define LOCKSTEP_WORKER_DEVICE_INFO_H_

#include <cstdint>
#include <string>

namespace lockstep {

struct DeviceInfo {
  std::string host;
  std::string processor;            // "AMD EPYC 7B13"
  uint32_t num_threads = 1;         // this process may run on
  uint64_t memory_total_bytes = 0;  // of the host, or the container's limit
  uint64_t memory_free_bytes = 0;   // likewise; page cache counts as free
};

// `root`: in front of every path, for tests.
DeviceInfo ReadDeviceInfo(const std::string& root = "");

// 64 random bits as hex: names a process across its streams.
std::string NewInstanceName();

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_DEVICE_INFO_H_
