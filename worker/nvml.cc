#include "worker/nvml.h"

#include <dlfcn.h>
#include <nvml.h>
#include <pthread.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

using worker::v1::DeviceStats;

// Entries that any driver of ours has, then those that may be missing. Types are
// written out where the header has them deprecated.
struct Nvml {
  decltype(&::nvmlInit_v2) init = nullptr;
  decltype(&::nvmlShutdown) shutdown = nullptr;
  decltype(&::nvmlErrorString) error_string = nullptr;
  decltype(&::nvmlDeviceGetHandleByUUID) by_uuid = nullptr;

  decltype(&::nvmlDeviceGetMemoryInfo) memory = nullptr;
  decltype(&::nvmlDeviceGetClockInfo) clock = nullptr;
  decltype(&::nvmlDeviceGetPowerUsage) power = nullptr;
  nvmlReturn_t (*temperature)(nvmlDevice_t, nvmlTemperatureSensors_t, unsigned int*) = nullptr;
  nvmlReturn_t (*clock_reasons)(nvmlDevice_t, unsigned long long*) = nullptr;
  decltype(&::nvmlGpmQueryDeviceSupport) gpm_support = nullptr;
  decltype(&::nvmlGpmSampleAlloc) gpm_alloc = nullptr;
  decltype(&::nvmlGpmSampleFree) gpm_free = nullptr;
  decltype(&::nvmlGpmSampleGet) gpm_get = nullptr;
  decltype(&::nvmlGpmMetricsGet) gpm_metrics = nullptr;

  // The library stays open: drivers do not like to be unloaded.
  absl::Status Open(const std::string& path) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return absl::NotFoundError(absl::StrCat("NVML: ", dlerror()));
    const auto get = [&](const char* name, auto* entry) {
      *entry = reinterpret_cast<std::remove_pointer_t<decltype(entry)>>(dlsym(library, name));
      return *entry != nullptr;
    };
    if (!get("nvmlInit_v2", &init) || !get("nvmlShutdown", &shutdown) ||
        !get("nvmlErrorString", &error_string) || !get("nvmlDeviceGetHandleByUUID", &by_uuid)) {
      return absl::NotFoundError(absl::StrCat("NVML: ", path, " is not NVML"));
    }
    get("nvmlDeviceGetMemoryInfo", &memory);
    get("nvmlDeviceGetClockInfo", &clock);
    get("nvmlDeviceGetPowerUsage", &power);
    get("nvmlDeviceGetTemperature", &temperature);
    if (!get("nvmlDeviceGetCurrentClocksEventReasons", &clock_reasons)) {
      get("nvmlDeviceGetCurrentClocksThrottleReasons", &clock_reasons);
    }
    const bool gpm = get("nvmlGpmQueryDeviceSupport", &gpm_support) &&
                     get("nvmlGpmSampleAlloc", &gpm_alloc) && get("nvmlGpmSampleFree", &gpm_free) &&
                     get("nvmlGpmSampleGet", &gpm_get) && get("nvmlGpmMetricsGet", &gpm_metrics);
    if (!gpm) gpm_support = nullptr;
    return absl::OkStatus();
  }
};

constexpr double kMebibyte = 1 << 20;

}  // namespace

struct NvmlSampler::Impl {
  explicit Impl(const NvmlOptions& o) : options(o) {}
  ~Impl() {
    if (thread.joinable()) {
      {
        const std::lock_guard lock(mutex);
        stopping = true;
        changed.notify_all();
      }
      thread.join();
    }
    for (const nvmlGpmSample_t sample : {before, now}) {
      if (sample != nullptr) (void)nvml.gpm_free(sample);
    }
    if (initialised) (void)nvml.shutdown();
  }

  absl::Status Init(const std::string& uuid);
  void OpenGpm();
  void AddGpm(DeviceStats* stats);
  DeviceStats Sample();
  void Loop();

  const NvmlOptions options;
  Nvml nvml;
  bool initialised = false;
  nvmlDevice_t device = nullptr;
  nvmlGpmSample_t before = nullptr, now = nullptr;  // null: no GPM
  bool have_before = false;
  int64_t free_bytes_at_start = 0;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::optional<DeviceStats> latest;  // not taken yet
  bool stopping = false;
  std::thread thread;
};

absl::Status NvmlSampler::Impl::Init(const std::string& uuid) {
  if (absl::Status opened = nvml.Open(options.library); !opened.ok()) return opened;
  nvmlReturn_t result = nvml.init();
  initialised = result == NVML_SUCCESS;
  if (initialised) result = nvml.by_uuid(uuid.c_str(), &device);
  if (result != NVML_SUCCESS) {
    return absl::NotFoundError(absl::StrCat("NVML: ", uuid, ": ", nvml.error_string(result)));
  }
  OpenGpm();
  nvmlMemory_t held = {};
  if (nvml.memory != nullptr && nvml.memory(device, &held) == NVML_SUCCESS) {
    free_bytes_at_start = static_cast<int64_t>(held.free);
  }
  return absl::OkStatus();
}

void NvmlSampler::Impl::OpenGpm() {
  if (nvml.gpm_support == nullptr) return;
  nvmlGpmSupport_t support = {};
  support.version = NVML_GPM_SUPPORT_VERSION;
  if (nvml.gpm_support(device, &support) != NVML_SUCCESS || support.isSupportedDevice == 0) return;
  nvmlGpmSample_t first = nullptr, second = nullptr;
  if (nvml.gpm_alloc(&first) != NVML_SUCCESS) return;
  if (nvml.gpm_alloc(&second) != NVML_SUCCESS) {
    (void)nvml.gpm_free(first);
    return;
  }
  before = first;
  now = second;
}

// Rates over the time since the sample before.
void NvmlSampler::Impl::AddGpm(DeviceStats* stats) {
  if (now == nullptr) return;
  if (nvml.gpm_get(device, now) != NVML_SUCCESS) {
    have_before = false;
    return;
  }
  const bool pair = std::exchange(have_before, true);
  if (pair) {
    nvmlGpmMetricsGet_t get = {};
    get.version = NVML_GPM_METRICS_GET_VERSION;
    get.sample1 = before;
    get.sample2 = now;
    for (const unsigned int id :
         {NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL,
          NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC}) {
      get.metrics[get.numMetrics++].metricId = id;
    }
    const bool got = nvml.gpm_metrics(&get) == NVML_SUCCESS;
    const auto value = [&](int i) -> std::optional<double> {
      const nvmlGpmMetric_t& metric = get.metrics[i];
      if (!got || metric.nvmlReturn != NVML_SUCCESS || !(metric.value >= 0) ||
          !std::isfinite(metric.value)) {
        return std::nullopt;
      }
      return metric.value;
    };
    if (const auto v = value(0)) stats->set_sm_active(static_cast<float>(*v / 100));
    if (const auto v = value(1)) stats->set_dram_active(static_cast<float>(*v / 100));
    if (const auto v = value(2)) {
      stats->set_nvlink_tx_bytes_per_second(static_cast<uint64_t>(*v * kMebibyte));
    }
    if (const auto v = value(3)) {
      stats->set_nvlink_rx_bytes_per_second(static_cast<uint64_t>(*v * kMebibyte));
    }
  }
  std::swap(before, now);
}

DeviceStats NvmlSampler::Impl::Sample() {
  DeviceStats stats;
  AddGpm(&stats);
  nvmlMemory_t memory = {};
  if (nvml.memory != nullptr && nvml.memory(device, &memory) == NVML_SUCCESS) {
    stats.set_memory_used_bytes(memory.used);
  }
  unsigned int value = 0;
  if (nvml.clock != nullptr && nvml.clock(device, NVML_CLOCK_SM, &value) == NVML_SUCCESS) {
    stats.set_sm_clock_mhz(value);
  }
  if (nvml.clock != nullptr && nvml.clock(device, NVML_CLOCK_MEM, &value) == NVML_SUCCESS) {
    stats.set_memory_clock_mhz(value);
  }
  if (nvml.power != nullptr && nvml.power(device, &value) == NVML_SUCCESS) {
    stats.set_power_watts(static_cast<float>(value) * 1e-3f);
  }
  if (nvml.temperature != nullptr &&
      nvml.temperature(device, NVML_TEMPERATURE_GPU, &value) == NVML_SUCCESS) {
    stats.set_temperature_celsius(value);
  }
  unsigned long long reasons = 0;
  if (nvml.clock_reasons != nullptr && nvml.clock_reasons(device, &reasons) == NVML_SUCCESS) {
    stats.set_throttle_reasons(reasons);
  }
  return stats;
}

void NvmlSampler::Impl::Loop() {
  pthread_setname_np(pthread_self(), "nvml");
  std::unique_lock lock(mutex);
  while (!stopping) {
    lock.unlock();
    DeviceStats stats = Sample();
    lock.lock();
    latest = std::move(stats);
    changed.wait_for(lock, std::chrono::milliseconds(options.interval_ms),
                     [this] { return stopping; });
  }
}

NvmlSampler::NvmlSampler(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NvmlSampler::~NvmlSampler() = default;

absl::StatusOr<std::unique_ptr<NvmlSampler>> NvmlSampler::Start(const std::string& uuid,
                                                                const NvmlOptions& options) {
  auto impl = std::make_unique<Impl>(options);
  if (absl::Status ready = impl->Init(uuid); !ready.ok()) return ready;
  Impl* const running = impl.get();
  impl->thread = std::thread([running] { running->Loop(); });
  return std::unique_ptr<NvmlSampler>(new NvmlSampler(std::move(impl)));
}

int64_t NvmlSampler::free_bytes_at_start() const { return impl_->free_bytes_at_start; }

std::optional<DeviceStats> NvmlSampler::Take() {
  const std::lock_guard lock(impl_->mutex);
  return std::exchange(impl_->latest, std::nullopt);
}

}  // namespace lockstep
