#include "worker/backend/cuda/model_weights.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace lockstep::cuda {
namespace {

// Looks names up, and keeps the first thing that is wrong.
class Resolver {
 public:
  Resolver(const ModelConfig& config, const DeviceWeights& weights)
      : config_(config), weights_(weights) {}

  DeviceTensor Matrix(const std::string& name, int64_t rows, int64_t cols) {
    const DeviceTensor* tensor = weights_.Find(name);
    if (tensor == nullptr || tensor->rows != rows || tensor->cols != cols) {
      status_.Update(absl::InvalidArgumentError(absl::StrCat(
          "local tensor \"", name, "\" is ",
          tensor == nullptr ? "missing" : absl::StrCat(tensor->rows, " x ", tensor->cols),
          "; the forward pass needs ", rows, " x ", cols)));
      return {};
    }
    return *tensor;
  }

  const void* Vector(const std::string& name, int64_t rows) { return Matrix(name, rows, 1).data; }

  Linear Product(const std::string& name, int64_t rows, int64_t cols, bool has_bias) {
    Linear linear{Matrix(name + ".weight", rows, cols), nullptr};
    if (has_bias) linear.bias = Vector(name + ".bias", rows);
    return linear;
  }

  kernels::NormSpec Norm(const std::string& name) {
    const bool layer_norm = config_.norm == NormKind::kLayer;
    kernels::NormSpec norm;
    norm.kind = layer_norm ? kernels::NormKind::kLayer : kernels::NormKind::kRms;
    norm.eps = static_cast<float>(config_.norm_eps);
    norm.plus_one = config_.norm_weight_plus_one;
    if (!config_.norm_affine) {
      norm.plus_one = false;  // a missing weight stands for ones
      return norm;
    }
    norm.weight = Vector(name + ".weight", config_.hidden_size);
    if (layer_norm) norm.bias = Vector(name + ".bias", config_.hidden_size);
    return norm;
  }

  const absl::Status& status() const { return status_; }

 private:
  const ModelConfig& config_;
  const DeviceWeights& weights_;
  absl::Status status_;
};

}  // namespace

kernels::NormSpec ModelWeights::Find(const NormRef& norm) const {
  switch (norm.site) {
    case NormRef::Site::kNone:
      return {};
    case NormRef::Site::kInput:
      return layers[norm.layer].input_norm;
    case NormRef::Site::kPostAttention:
      return layers[norm.layer].post_attention_norm;
    case NormRef::Site::kMlp:
      return layers[norm.layer].mlp_norm;
    case NormRef::Site::kPostMlp:
      return layers[norm.layer].post_mlp_norm;
    case NormRef::Site::kFinal:
      return final_norm;
  }
  return {};
}

absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const DeviceWeights& weights) {
  const int64_t hidden = config.hidden_size;
  const int64_t heads = plan.local_heads * config.head_dim;
  const int64_t kv_heads = plan.local_kv_heads * config.head_dim;
  const int64_t up_rows = plan.local_intermediate * (config.gated_mlp ? 2 : 1);

  ModelWeights model;
  Resolver resolve(config, weights);
  model.embedding = resolve.Matrix("embedding.weight", plan.local_vocab, config.embedding_dim);
  model.head = config.tie_word_embeddings
                   ? model.embedding
                   : resolve.Matrix("head.weight", plan.local_vocab, config.embedding_dim);
  if (config.position == PositionKind::kLearned) {
    model.position = resolve.Matrix(
        "position.weight", config.max_position_embeddings + config.position_offset, hidden);
  }
  if (config.embedding_dim != hidden) {
    model.project_in = resolve.Matrix("project_in.weight", hidden, config.embedding_dim);
    model.project_out = resolve.Matrix("project_out.weight", config.embedding_dim, hidden);
  }
  if (config.final_norm) model.final_norm = resolve.Norm("final_norm");

  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string layer = absl::StrCat("layers.", i, ".");
    LayerWeights& w = model.layers.emplace_back();
    w.input_norm = resolve.Norm(layer + "input_norm");
    w.mlp_norm = resolve.Norm(layer + "mlp_norm");
    if (config.sandwich_norms) {
      w.post_attention_norm = resolve.Norm(layer + "post_attention_norm");
      w.post_mlp_norm = resolve.Norm(layer + "post_mlp_norm");
    }
    if (config.qk_norm) {
      w.q_norm = resolve.Vector(layer + "q_norm.weight", config.head_dim);
      w.k_norm = resolve.Vector(layer + "k_norm.weight", config.head_dim);
    }
    w.qkv = resolve.Product(layer + "qkv", heads + 2 * kv_heads, hidden, config.qkv_bias);
    w.o = resolve.Product(layer + "o", hidden, heads, config.attention_output_bias);
    w.up = resolve.Product(layer + (config.gated_mlp ? "gate_up" : "up"), up_rows, hidden,
                           config.mlp_bias);
    w.down = resolve.Product(layer + "down", hidden, plan.local_intermediate, config.mlp_bias);
  }
  if (!resolve.status().ok()) return resolve.status();
  return model;
}

}  // namespace lockstep::cuda
