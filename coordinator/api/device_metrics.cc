#include "coordinator/api/device_metrics.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace lockstep {

DeviceMetrics::DeviceMetrics(prometheus::Registry* registry) {
  const auto add = [&](Figure figure, const std::string& name, const std::string& help) {
    metrics_.push_back({figure,
                        &prometheus::BuildGauge()
                             .Name(absl::StrCat("lockstep_gpu_", name))
                             .Help(help)
                             .Register(*registry),
                        {}});
  };
  using F = DeviceFigures;
  add(&F::sm_active, "sm_active", "Share of a rank's multiprocessors that were busy, 0 to 1.");
  add(&F::dram_active, "dram_active", "Share of its memory bandwidth in use, 0 to 1.");
  add(&F::nvlink_tx_bytes_per_second, "nvlink_tx_bytes_per_second", "Sent over all its NVLinks.");
  add(&F::nvlink_rx_bytes_per_second, "nvlink_rx_bytes_per_second",
      "Received over all its NVLinks.");
  add(&F::memory_used_bytes, "memory_used_bytes", "Device memory in use, by any process.");
  add(&F::sm_clock_hertz, "sm_clock_hertz", "Clock of its multiprocessors.");
  add(&F::memory_clock_hertz, "memory_clock_hertz", "Clock of its memory.");
  add(&F::power_watts, "power_watts", "Power draw.");
  add(&F::temperature_celsius, "temperature_celsius", "Temperature of the chip.");
  add(&F::throttle_reasons, "throttle_reasons", "NVML's bits of why clocks are low; 0: none.");
}

void DeviceMetrics::Set(const std::vector<DeviceFigures>& devices) {
  for (Metric& metric : metrics_) {
    std::map<uint32_t, prometheus::Gauge*> now;
    for (const DeviceFigures& device : devices) {
      const std::optional<double>& value = device.*metric.figure;
      if (!value.has_value()) continue;
      prometheus::Gauge& gauge = metric.family->Add({{"rank", absl::StrCat(device.rank)}});
      gauge.Set(*value);
      now[device.rank] = &gauge;
    }
    for (const auto& [rank, gauge] : metric.by_rank) {
      if (now.count(rank) == 0) metric.family->Remove(gauge);
    }
    metric.by_rank = std::move(now);
  }
}

}  // namespace lockstep
