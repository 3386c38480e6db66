// A rank's weights on the GPU by role: the names of a shard plan's tensors
// resolved once.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_MODEL_WEIGHTS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_MODEL_WEIGHTS_H_

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/norm.h"
#include "model/model_config.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/device_weights.h"

namespace lockstep::cuda {

struct Linear {
  DeviceTensor weight;         // [out, in]
  const void* bias = nullptr;  // [out], or null
};

struct LayerWeights {
  kernels::NormSpec input_norm, post_attention_norm, mlp_norm, post_mlp_norm;
  const void* q_norm = nullptr;  // [head_dim], or null
  const void* k_norm = nullptr;
  Linear qkv, o, up, down;  // up: gate and up interleaved, where the MLP is gated
};

struct ModelWeights {
  DeviceTensor embedding;
  DeviceTensor head;      // the embedding, where tied
  DeviceTensor position;  // data null where the model has none, like the next two
  DeviceTensor project_in, project_out;
  kernels::NormSpec final_norm;
  std::vector<LayerWeights> layers;

  // Of kind kNone for NormRef's kNone.
  kernels::NormSpec Find(const NormRef& norm) const;
};

// InvalidArgument names a tensor that the weights lack or whose shape is another.
absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const DeviceWeights& weights);

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_MODEL_WEIGHTS_H_
