// The ranks' devices, as their drivers see them, as gauges: a figure that a
// driver does not give is absent, never zero. One thread at a time.
#ifndef LOCKSTEP_COORDINATOR_API_DEVICE_METRICS_H_
#define LOCKSTEP_COORDINATOR_API_DEVICE_METRICS_H_

#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "coordinator/group_watch.h"

namespace lockstep {

class DeviceMetrics {
 public:
  explicit DeviceMetrics(prometheus::Registry* registry);
  // What is not in `devices` is no longer exposed.
  void Set(const std::vector<DeviceFigures>& devices);

 private:
  using Figure = std::optional<double> DeviceFigures::*;
  struct Metric {
    Figure figure;
    prometheus::Family<prometheus::Gauge>* family;
    std::map<uint32_t, prometheus::Gauge*> by_rank;
  };
  std::vector<Metric> metrics_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_DEVICE_METRICS_H_
