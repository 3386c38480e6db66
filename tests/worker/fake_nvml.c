// NVML as far as worker/nvml.cc uses it, for a GPU that exists nowhere. What it
// says is chosen by the environment at nvmlInit_v2:
//   FAKE_NVML=whole    everything
//   FAKE_NVML=nogpm    a GPU without GPM counters, and no power meter
//   FAKE_NVML=broken   no answer to anything
#include <nvml.h>
#include <stdlib.h>
#include <string.h>

static int gpm, works;
static unsigned samples;
struct nvmlGpmSample_st {
  unsigned number;
};

nvmlReturn_t nvmlInit_v2(void) {
  const char* mode = getenv("FAKE_NVML");
  works = mode != NULL && strcmp(mode, "broken") != 0;
  gpm = works && strcmp(mode, "nogpm") != 0;
  samples = 0;
  return NVML_SUCCESS;
}
nvmlReturn_t nvmlShutdown(void) { return NVML_SUCCESS; }
const char* nvmlErrorString(nvmlReturn_t result) {
  return result == NVML_ERROR_NOT_FOUND ? "no such GPU" : "an error";
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
  if (strcmp(uuid, "GPU-1") != 0) return NVML_ERROR_NOT_FOUND;
  *device = (nvmlDevice_t)&samples;
  return NVML_SUCCESS;
}
static nvmlReturn_t Answer(void) { return works ? NVML_SUCCESS : NVML_ERROR_UNKNOWN; }
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
  (void)device;
  memory->used = 7ull << 30;
  memory->free = 130ull << 30;
  return Answer();
}
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned* mhz) {
  (void)device;
  *mhz = type == NVML_CLOCK_SM ? 1980 : 3201;
  return Answer();
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned* milliwatts) {
  (void)device;
  *milliwatts = 512500;
  return gpm ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor,
                                      unsigned* celsius) {
  (void)device, (void)sensor;
  *celsius = 61;
  return Answer();
}
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long* why) {
  (void)device;
  *why = 4;
  return Answer();
}
nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, nvmlGpmSupport_t* support) {
  (void)device;
  if (support->version != NVML_GPM_SUPPORT_VERSION) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  support->isSupportedDevice = (unsigned)gpm;
  return Answer();
}
nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t* sample) {
  *sample = calloc(1, sizeof(struct nvmlGpmSample_st));
  return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t sample) {
  free(sample);
  return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, nvmlGpmSample_t sample) {
  (void)device;
  sample->number = ++samples;
  return Answer();
}
nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t* get) {
  unsigned i;
  if (get->version != NVML_GPM_METRICS_GET_VERSION || get->sample1->number == 0 ||
      get->sample2->number != get->sample1->number + 1) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  for (i = 0; i < get->numMetrics; ++i) {
    nvmlGpmMetric_t* metric = &get->metrics[i];
    metric->nvmlReturn = NVML_SUCCESS;
    switch (metric->metricId) {
      case NVML_GPM_METRIC_SM_UTIL:
        metric->value = 87.5;
        break;
      case NVML_GPM_METRIC_DRAM_BW_UTIL:
        metric->value = 62.5;
        break;
      case NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC:
        metric->value = 1024;
        break;
      default:
        metric->nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    }
  }
  return NVML_SUCCESS;
}
