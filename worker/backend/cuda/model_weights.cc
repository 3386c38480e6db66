#include "worker/backend/cuda/model_weights.h"

#include <string>

#include "worker/backend/weight_roles.h"

namespace lockstep::cuda {

kernels::NormSpec ModelWeights::Find(const NormRef& norm) const {
  const kernels::NormSpec* const found = FindNorm(*this, norm);
  return found == nullptr ? kernels::NormSpec{} : *found;
}

absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const DeviceWeights& weights) {
  TensorLookup<DeviceWeights, DeviceTensor> find(weights);
  const bool layer_norm = config.norm == NormKind::kLayer;
  const auto make_norm = [&](const std::string& name) {
    kernels::NormSpec norm;
    norm.kind = layer_norm ? kernels::NormKind::kLayer : kernels::NormKind::kRms;
    norm.eps = static_cast<float>(config.norm_eps);
    if (!config.norm_affine) return norm;  // a missing weight stands for ones
    norm.plus_one = config.norm_weight_plus_one;
    norm.weight = find.Vector<void>(name + ".weight", config.hidden_size);
    if (layer_norm) norm.bias = find.Vector<void>(name + ".bias", config.hidden_size);
    return norm;
  };
  ModelWeights model;
  AssignRoles<void>(config, plan, find, make_norm, &model);
  if (!find.status().ok()) return find.status();
  return model;
}

}  // namespace lockstep::cuda
