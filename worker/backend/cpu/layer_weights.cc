#include "worker/backend/cpu/layer_weights.h"

#include "absl/strings/str_cat.h"

namespace lockstep::cpu {
namespace {

// Looks names up, and keeps the first thing that is wrong.
class Resolver {
 public:
  Resolver(const ModelConfig& config, const Weights& weights, const ModelWeights& model)
      : config_(config), weights_(weights), model_(model) {}

  WeightTensor Matrix(const std::string& name, int64_t rows, int64_t cols) {
    const WeightTensor* tensor = weights_.Find(name);
    if (tensor == nullptr) {
      Fail(absl::StrCat("the shard plan has no tensor \"", name,
                        "\", which the model's config needs"));
      return {};
    }
    if (tensor->rows != rows || tensor->cols != cols) {
      Fail(absl::StrCat("local tensor \"", name, "\" is ", tensor->rows, " x ", tensor->cols,
                        "; the forward pass needs ", rows, " x ", cols));
    }
    return *tensor;
  }

  const float* Vector(const std::string& name, int64_t rows) {
    return reinterpret_cast<const float*>(Matrix(name, rows, 1).data);
  }

  Linear Product(const std::string& name, int64_t rows, int64_t cols, bool has_bias) {
    Linear linear{Matrix(name + ".weight", rows, cols), nullptr};
    if (has_bias) linear.bias = Vector(name + ".bias", rows);
    return linear;
  }

  NormWeights Norm(const std::string& name) {
    if (!config_.norm_affine) return {model_.identity.data(), model_.zeros.data()};
    NormWeights norm{Vector(name + ".weight", config_.hidden_size), nullptr};
    if (config_.norm == NormKind::kLayer) {
      norm.bias = Vector(name + ".bias", config_.hidden_size);
    }
    return norm;
  }

  const absl::Status& status() const { return status_; }

 private:
  void Fail(const std::string& what) { status_.Update(absl::InvalidArgumentError(what)); }

  const ModelConfig& config_;
  const Weights& weights_;
  const ModelWeights& model_;
  absl::Status status_;
};

}  // namespace

const NormWeights* ModelWeights::Find(const NormRef& norm) const {
  switch (norm.site) {
    case NormRef::Site::kNone:
      return nullptr;
    case NormRef::Site::kInput:
      return &layers[norm.layer].input_norm;
    case NormRef::Site::kPostAttention:
      return &layers[norm.layer].post_attention_norm;
    case NormRef::Site::kMlp:
      return &layers[norm.layer].mlp_norm;
    case NormRef::Site::kPostMlp:
      return &layers[norm.layer].post_mlp_norm;
    case NormRef::Site::kFinal:
      return &final_norm;
  }
  return nullptr;
}

absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const ShardPlan& plan,
                                            const Weights& weights) {
  const int64_t hidden = config.hidden_size;
  const int64_t heads = plan.local_heads * config.head_dim;
  const int64_t kv_heads = plan.local_kv_heads * config.head_dim;
  const int64_t up_rows = plan.local_intermediate * (config.gated_mlp ? 2 : 1);

  ModelWeights model;
  model.identity.assign(hidden, config.norm_weight_plus_one ? 0.0f : 1.0f);
  model.zeros.assign(hidden, 0.0f);
  Resolver resolve(config, weights, model);
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

}  // namespace lockstep::cpu
