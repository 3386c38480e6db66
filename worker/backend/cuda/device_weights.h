// A rank's weights in GPU memory: every LocalTensor of a shard plan, in the
// serving dtype (norms and biases too), or, quantised, the layers' matrices in
// e4m3 with a scale a row: made here, or as an FP8 checkpoint has them. Gate and up are
// interleaved: row 2i is gate i, row 2i + 1 is up i, as the fused kernels read them. Immutable once
// loaded.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_DEVICE_WEIGHTS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_DEVICE_WEIGHTS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/types.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/thread_pool.h"

namespace lockstep::cuda {

kernels::Type ToType(DType dtype);

struct DeviceTensor {
  void* data = nullptr;
  kernels::Type type = kernels::Type::kBF16;
  int64_t rows = 0, cols = 0;
  const float* scales = nullptr;  // [rows], kE4M3
};

struct DeviceWeightOptions {
  DType dtype = DType::kBFloat16;
  std::string quantization;  // "" or "fp8"
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
};

class DeviceWeights {
 public:
  // Reads only this rank's bytes: `pool` converts pieces into pinned memory while
  // the ones before travel. NotFound / InvalidArgument name tensor and file;
  // ResourceExhausted says what is needed and what is free.
  static absl::StatusOr<std::unique_ptr<DeviceWeights>> Load(const Checkpoint& checkpoint,
                                                             const ShardPlan& plan,
                                                             const DeviceWeightOptions& options,
                                                             ThreadPool* pool);
  // --load-format dummy, made on the GPU; the same values as the cpu backend's.
  static absl::StatusOr<std::unique_ptr<DeviceWeights>> Dummy(const ShardPlan& plan,
                                                              const ModelConfig& config,
                                                              const DeviceWeightOptions& options);

  const DeviceTensor* Find(std::string_view name) const;
  int64_t allocated_bytes() const { return allocated_bytes_; }
  int64_t checkpoint_bytes() const { return checkpoint_bytes_; }

 private:
  class Builder;

  Buffer<std::byte> arena_;
  int64_t allocated_bytes_ = 0;
  int64_t checkpoint_bytes_ = 0;
  absl::flat_hash_map<std::string, DeviceTensor> tensors_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_DEVICE_WEIGHTS_H_
