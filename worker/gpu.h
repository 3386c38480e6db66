// What a worker process does with its one GPU, so that the rest of it names no
// CUDA: a build without CUDA has gpu_none.cc, which says so.
#ifndef LOCKSTEP_WORKER_GPU_H_
#define LOCKSTEP_WORKER_GPU_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "proto/worker.pb.h"
#include "worker/backend/backend.h"
#include "worker/comm/rank_communicator.h"
#include "worker/device_trace.h"
#include "worker/thread_pool.h"

namespace lockstep {

struct GpuInfo {
  std::string name, uuid;
  uint64_t memory_total_bytes = 0, memory_free_bytes = 0;
};

struct GpuLoad {
  const Checkpoint* checkpoint = nullptr;  // null: dummy weights
  DType dtype = DType::kBFloat16;
  std::optional<DType> kv_dtype;  // nothing: dtype
  std::string quantization;       // "" or "fp8"
  BackendLimits limits;
  bool graphs = true;
  bool row_stack = true;  // one decoded row by kernels/row_stack.h, where that takes it
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
  std::function<void(const std::string& phase)> end_phase;
  int64_t* checkpoint_bytes = nullptr;  // read from files; may be null
};

class Gpu {
 public:
  virtual ~Gpu() = default;
  // Takes the device for this process: makes its context, loads every kernel.
  // NotFound: no driver, no such device. Unimplemented: a build without CUDA, or without kernels
  // for this device.
  static absl::StatusOr<std::unique_ptr<Gpu>> Open(int device);

  // From any thread.
  virtual GpuInfo Info() = 0;
  virtual std::string collective_library() = 0;
  virtual std::unique_ptr<RankCommunicator> MakeCommunicator(
      const CommunicatorOptions& options) = 0;
  // From the thread that will compute.
  virtual absl::StatusOr<std::unique_ptr<Backend>> Load(const ModelConfig& config,
                                                        const ShardPlan& plan, const GpuLoad& load,
                                                        ThreadPool* pool) = 0;
  // What its driver says of it, since last asked; empty: nothing new, or no NVML.
  // From any thread.
  virtual std::optional<worker::v1::DeviceStats> TakeStats() = 0;
  // What the device runs, as it runs it; NotFound: no CUPTI on this host.
  virtual absl::StatusOr<std::unique_ptr<DeviceTrace>> OpenTrace() = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_GPU_H_
