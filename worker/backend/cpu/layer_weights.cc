#include "worker/backend/cpu/layer_weights.h"

#include "worker/backend/weight_roles.h"

namespace lockstep::cpu {

const NormWeights* ModelWeights::Find(const NormRef& norm) const { return FindNorm(*this, norm); }

absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const Weights& weights) {
  ModelWeights model;
  model.identity.assign(config.hidden_size, config.norm_weight_plus_one ? 0.0f : 1.0f);
  model.zeros.assign(config.hidden_size, 0.0f);
  TensorLookup<Weights, WeightTensor> find(weights);
  const auto make_norm = [&](const std::string& name) -> NormWeights {
    if (!config.norm_affine) return {model.identity.data(), model.zeros.data()};
    NormWeights norm{find.Vector<float>(name + ".weight", config.hidden_size), nullptr};
    if (config.norm == NormKind::kLayer) {
      norm.bias = find.Vector<float>(name + ".bias", config.hidden_size);
    }
    return norm;
  };
  AssignRoles<float>(config, plan, find, make_norm, &model);
  if (!find.status().ok()) return find.status();
  return model;
}

}  // namespace lockstep::cpu
