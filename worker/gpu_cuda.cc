#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "worker/backend/cuda/cuda_backend.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/backend/cuda/kernel_trace.h"
#include "worker/comm/cuda/device_communicator.h"
#include "worker/gpu.h"
#include "worker/kv_scales.h"
#include "worker/nvml.h"

namespace lockstep {
namespace {

// CUPTI's records as the runner wants them, between two moments at which the
// device is idle.
class CudaTrace final : public DeviceTrace {
 public:
  CudaTrace(int device, std::unique_ptr<cuda::KernelTrace> trace)
      : device_(device), trace_(std::move(trace)) {}

  absl::Status Start() override { return trace_->Start(); }

  absl::StatusOr<std::vector<DeviceEvent>> Stop() override {
    // A step's result is seen just before its last kernel has ended.
    absl::Status status = cuda::ToStatus(cudaSetDevice(device_), "the traced GPU");
    if (status.ok()) status = cuda::ToStatus(cudaDeviceSynchronize(), "the end of the trace");
    absl::StatusOr<std::vector<cuda::KernelRecord>> records = trace_->Stop();
    if (!status.ok()) return status;
    if (!records.ok()) return records.status();
    std::vector<DeviceEvent> events;
    events.reserve(records->size());
    for (cuda::KernelRecord& from : *records) {
      events.push_back({std::move(from.name), from.begin_ns, from.end_ns, from.stream,
                        from.copy ? 0 : from.grid, from.block});
    }
    return events;
  }

 private:
  const int device_;
  const std::unique_ptr<cuda::KernelTrace> trace_;
};

absl::StatusOr<std::vector<KvScales>> KvScalesOf(const ModelConfig& config, const GpuLoad& load) {
  if (load.kv_dtype != DType::kFloat8E4M3 || load.checkpoint == nullptr) {
    return std::vector<KvScales>();
  }
  absl::StatusOr<std::vector<KvScales>> scales = ReadKvScales(*load.checkpoint, config.num_layers);
  if (scales.ok()) {
    LogInfo(scales->empty() ? "keys and values of 8 bits, stored as they are"
                            : "keys and values of 8 bits, by the checkpoint's scales");
  }
  return scales;
}

class CudaGpu final : public Gpu {
 public:
  explicit CudaGpu(int device) : device_(device) {}

  absl::Status Init() {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
      return absl::NotFoundError(
          absl::StrCat("--backend cuda: no usable GPU: ", cudaGetErrorString(error)));
    }
    if (device_ < 0 || device_ >= count) {
      return absl::NotFoundError(absl::StrCat("--device ", device_, ": this host shows ", count,
                                              count == 1 ? " GPU" : " GPUs", "; expected 0 to ",
                                              count - 1));
    }
    absl::Status status =
        cuda::ToStatus(cudaGetDeviceProperties(&properties_, device_), "reading the GPU");
    if (!status.ok()) return status;
    if (properties_.major != 9) {
      return absl::UnimplementedError(
          absl::StrCat("GPU ", device_, " is ", properties_.name, " (sm_", properties_.major,
                       properties_.minor, "); this build has kernels for sm_90a (Hopper)"));
    }
    // Before the context, whose size shows in what is free then and later.
    absl::StatusOr<std::unique_ptr<NvmlSampler>> nvml = NvmlSampler::Start(Uuid());
    if (nvml.ok()) {
      nvml_ = *std::move(nvml);
      free_bytes_before_ = nvml_->free_bytes_at_start();
    } else {
      LogInfo(absl::StrCat("no figures of the GPU: ", std::string(nvml.status().message())));
    }
    status = cuda::ToStatus(cudaSetDevice(device_), absl::StrCat("GPU ", device_));
    if (!status.ok()) return status;
    return cuda::InitKernels();
  }

  GpuInfo Info() override {
    GpuInfo info;
    info.name = properties_.name;
    info.uuid = Uuid();
    size_t free_bytes = 0, total_bytes = 0;
    if (cudaSetDevice(device_) == cudaSuccess &&
        cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess) {
      info.memory_total_bytes = total_bytes;
      info.memory_free_bytes = free_bytes;
    }
    return info;
  }

  std::string collective_library() override { return DeviceCollectiveLibrary(); }

  std::unique_ptr<RankCommunicator> MakeCommunicator(const CommunicatorOptions& options) override {
    return std::make_unique<DeviceCommunicator>(options, device_);
  }

  absl::StatusOr<std::unique_ptr<Backend>> Load(const ModelConfig& config, const ShardPlan& plan,
                                                const GpuLoad& load, ThreadPool* pool) override {
    absl::Status status = cuda::ToStatus(cudaSetDevice(device_), absl::StrCat("GPU ", device_));
    if (!status.ok()) return status;
    const absl::StatusOr<std::vector<KvScales>> kv_scales = KvScalesOf(config, load);
    if (!kv_scales.ok()) return kv_scales.status();
    const cuda::DeviceWeightOptions options = {
        .dtype = load.dtype, .quantization = load.quantization, .progress = load.progress};
    absl::StatusOr<std::unique_ptr<cuda::DeviceWeights>> weights =
        load.checkpoint == nullptr
            ? cuda::DeviceWeights::Dummy(plan, config, options)
            : cuda::DeviceWeights::Load(*load.checkpoint, plan, options, pool);
    if (!weights.ok()) return weights.status();
    if (load.checkpoint_bytes != nullptr) *load.checkpoint_bytes = (*weights)->checkpoint_bytes();
    if (load.end_phase) load.end_phase("load");
    return cuda::MakeCudaBackend(config, plan, *std::move(weights),
                                 {.limits = load.limits,
                                  .dtype = load.dtype,
                                  .kv_dtype = load.kv_dtype.value_or(load.dtype),
                                  .kv_scales = *kv_scales,
                                  .graphs = load.graphs,
                                  .row_stack = load.row_stack,
                                  .free_bytes_before = free_bytes_before_});
  }

  std::optional<worker::v1::DeviceStats> TakeStats() override {
    return nvml_ == nullptr ? std::nullopt : nvml_->Take();
  }

  absl::StatusOr<std::unique_ptr<DeviceTrace>> OpenTrace() override {
    absl::StatusOr<std::unique_ptr<cuda::KernelTrace>> trace = cuda::KernelTrace::Open();
    if (!trace.ok()) return trace.status();
    return std::make_unique<CudaTrace>(device_, *std::move(trace));
  }

 private:
  std::string Uuid() const {
    const auto* id = reinterpret_cast<const unsigned char*>(properties_.uuid.bytes);
    std::string uuid = "GPU-";
    for (int i = 0; i < 16; ++i) {
      if (i == 4 || i == 6 || i == 8 || i == 10) uuid += '-';
      absl::StrAppend(&uuid, absl::Hex(id[i], absl::kZeroPad2));
    }
    return uuid;
  }

  const int device_;
  int64_t free_bytes_before_ = 0;  // 0: not known
  cudaDeviceProp properties_ = {};
  std::unique_ptr<NvmlSampler> nvml_;  // null: the driver has none
};

}  // namespace

absl::StatusOr<std::unique_ptr<Gpu>> Gpu::Open(int device) {
  // Before the driver starts: ranks wait for each other inside kernels, and a
  // kernel loaded when first used would wait for the device, which waits for a peer.
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/1);
  auto gpu = std::make_unique<CudaGpu>(device);
  if (absl::Status status = gpu->Init(); !status.ok()) return status;
  return gpu;
}

}  // namespace lockstep
