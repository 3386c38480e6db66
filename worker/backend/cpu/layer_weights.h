// A rank's weights by role: the names of a shard plan's tensors resolved once.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_LAYER_WEIGHTS_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_LAYER_WEIGHTS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "worker/backend/backend.h"
#include "worker/weights.h"

namespace lockstep::cpu {

struct NormWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;  // LayerNorm
};

struct Linear {
  WeightTensor weight;          // [out, in]
  const float* bias = nullptr;  // [out], or null
};

struct LayerWeights {
  NormWeights input_norm, post_attention_norm, mlp_norm, post_mlp_norm;
  const float* q_norm = nullptr;  // [head_dim], or null
  const float* k_norm = nullptr;
  Linear qkv, o, up, down;  // up: gate and up, where the MLP is gated
};

struct ModelWeights {
  WeightTensor embedding;
  WeightTensor head;      // the embedding, where tied
  WeightTensor position;  // data null where the model has none, like the next two
  WeightTensor project_in, project_out;
  NormWeights final_norm;
  std::vector<LayerWeights> layers;
  std::vector<float> identity, zeros;  // stand in for norms that have no tensors

  // Null for kNone.
  const NormWeights* Find(const NormRef& norm) const;
};

// InvalidArgument names a tensor that the config asks for and the weights lack,
// or whose local shape is another.
absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const Weights& weights);

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_LAYER_WEIGHTS_H_
