// The seam on an NVIDIA GPU: kernels/ and cuBLASLt on one stream.
//
//   a step of decodes   one row a sequence, padded to a bucket; captured once as a
//                       CUDA graph for each (bucket, kind of sampling), then replayed
//   any other step      enqueued kernel by kernel
//
// The host enqueues a step while the one before runs, and hears of its end by a
// number in mapped memory: no copy, no event, no wait in between.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_BACKEND_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_BACKEND_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/device_weights.h"
#include "worker/kv_scales.h"

namespace lockstep::cuda {

struct CudaBackendOptions {
  BackendLimits limits;
  DType dtype = DType::kBFloat16;     // of activations
  DType kv_dtype = DType::kBFloat16;  // dtype, or float8_e4m3fn: value / scale, saturated
  std::vector<KvScales> kv_scales;    // of float8_e4m3fn, one a layer; empty: 1
  bool graphs = true;
  bool row_stack = true;  // one decoded row by kernels/row_stack.h, where that takes it
  // Free on the device before this process had a context there; 0: not known.
  int64_t free_bytes_before = 0;
};

// On the current device; the caller's thread is the one that will call. Once for
// a process, before the first: InitKernels.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const ModelConfig& config,
                                                         const ShardPlan& plan,
                                                         std::unique_ptr<DeviceWeights> weights,
                                                         const CudaBackendOptions& options);

// Loads every kernel on the current device: a lazy load may wait for a device
// that waits for a peer.
absl::Status InitKernels();

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_BACKEND_H_
