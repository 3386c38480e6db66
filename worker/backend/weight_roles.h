// Which tensor of a shard plan plays which role in the forward pass: the names and
// shapes, once for all backends. A backend brings its own types: Tensor (rows, cols
// and data), Linear (weight and bias), and what it makes of a norm.
#ifndef LOCKSTEP_WORKER_BACKEND_WEIGHT_ROLES_H_
#define LOCKSTEP_WORKER_BACKEND_WEIGHT_ROLES_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "worker/backend/backend.h"

namespace lockstep {

// Looks local tensors up in `Weights` (const Tensor* Find(name)), and keeps the
// first thing that is wrong. One thread.
template <typename Weights, typename Tensor>
class TensorLookup {
 public:
  explicit TensorLookup(const Weights& weights) : weights_(weights) {}

  // An empty tensor where there is none of this shape.
  Tensor Matrix(const std::string& name, int64_t rows, int64_t cols) {
    const Tensor* tensor = weights_.Find(name);
    if (tensor != nullptr && tensor->rows == rows && tensor->cols == cols) return *tensor;
    status_.Update(absl::InvalidArgumentError(absl::StrCat(
        "local tensor \"", name, "\" is ",
        tensor == nullptr ? "missing" : absl::StrCat(tensor->rows, " x ", tensor->cols),
        "; the forward pass needs ", rows, " x ", cols)));
    return {};
  }
  // [rows], of T.
  template <typename T>
  const T* Vector(const std::string& name, int64_t rows) {
    return static_cast<const T*>(static_cast<const void*>(Matrix(name, rows, 1).data));
  }

  const absl::Status& status() const { return status_; }

 private:
  const Weights& weights_;
  absl::Status status_;
};

// Fills `model`, a backend's ModelWeights whose vectors are of T. `norm(name)` makes
// the backend's norm of the tensors "NAME.weight" and "NAME.bias". What is wrong is
// in `find`.
template <typename T, typename Lookup, typename MakeNorm, typename Model>
void AssignRoles(const ModelConfig& config, const ShardPlan& plan, Lookup& find, MakeNorm norm,
                 Model* model) {
  const int64_t hidden = config.hidden_size;
  const int64_t heads = plan.local_heads * config.head_dim;
  const int64_t kv_heads = plan.local_kv_heads * config.head_dim;
  const int64_t up_rows = plan.local_intermediate * (config.gated_mlp ? 2 : 1);
  const auto assign = [&find](auto* linear, const std::string& name, int64_t rows, int64_t cols,
                              bool has_bias) {
    linear->weight = find.Matrix(name + ".weight", rows, cols);
    if (has_bias) linear->bias = find.template Vector<T>(name + ".bias", rows);
  };

  model->embedding = find.Matrix("embedding.weight", plan.local_vocab, config.embedding_dim);
  model->head = config.tie_word_embeddings
                    ? model->embedding
                    : find.Matrix("head.weight", plan.local_vocab, config.embedding_dim);
  if (config.position == PositionKind::kLearned) {
    model->position = find.Matrix("position.weight",
                                  config.max_position_embeddings + config.position_offset, hidden);
  }
  if (config.embedding_dim != hidden) {
    model->project_in = find.Matrix("project_in.weight", hidden, config.embedding_dim);
    model->project_out = find.Matrix("project_out.weight", config.embedding_dim, hidden);
  }
  if (config.final_norm) model->final_norm = norm("final_norm");

  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string layer = absl::StrCat("layers.", i, ".");
    auto& w = model->layers.emplace_back();
    w.input_norm = norm(layer + "input_norm");
    w.mlp_norm = norm(layer + "mlp_norm");
    if (config.sandwich_norms) {
      w.post_attention_norm = norm(layer + "post_attention_norm");
      w.post_mlp_norm = norm(layer + "post_mlp_norm");
    }
    if (config.qk_norm) {
      w.q_norm = find.template Vector<T>(layer + "q_norm.weight", config.head_dim);
      w.k_norm = find.template Vector<T>(layer + "k_norm.weight", config.head_dim);
    }
    assign(&w.qkv, layer + "qkv", heads + 2 * kv_heads, hidden, config.qkv_bias);
    assign(&w.o, layer + "o", hidden, heads, config.attention_output_bias);
    assign(&w.up, layer + (config.gated_mlp ? "gate_up" : "up"), up_rows, hidden, config.mlp_bias);
    assign(&w.down, layer + "down", hidden, plan.local_intermediate, config.mlp_bias);
  }
}

// The norm that `norm` names; null for kNone.
template <typename Model>
auto FindNorm(const Model& model, const NormRef& norm) -> const decltype(model.final_norm)* {
  switch (norm.site) {
    case NormRef::Site::kNone:
      return nullptr;
    case NormRef::Site::kInput:
      return &model.layers[norm.layer].input_norm;
    case NormRef::Site::kPostAttention:
      return &model.layers[norm.layer].post_attention_norm;
    case NormRef::Site::kMlp:
      return &model.layers[norm.layer].mlp_norm;
    case NormRef::Site::kPostMlp:
      return &model.layers[norm.layer].post_mlp_norm;
    case NormRef::Site::kFinal:
      return &model.final_norm;
  }
  return nullptr;
}

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_BACKEND_WEIGHT_ROLES_H_
