#include "model/shard_plan.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/strings.h"

namespace lockstep {
namespace {

constexpr int64_t kMaxSlices = 8;

// More slices are more parallel units of a sum; a tp_size that divides them
// gets the same sums as one rank alone.
int64_t SlicesOf(int64_t count) {
  int64_t slices = kMaxSlices;
  while (count % slices != 0) slices /= 2;
  return slices;
}

// Empty when it works.
std::string WhyNot(const ModelConfig& config, int64_t tp_size) {
  if (tp_size < 1) return "it must be at least 1";
  if (config.num_heads % tp_size != 0) {
    return absl::StrCat("the ", config.num_heads, " attention heads are not divisible by it");
  }
  if (config.intermediate_size % tp_size != 0) {
    return absl::StrCat("the ", config.intermediate_size, " MLP columns are not divisible by it");
  }
  if (config.num_kv_heads % tp_size != 0 && tp_size % config.num_kv_heads != 0) {
    return absl::StrCat("the ", config.num_kv_heads,
                        " KV heads can be neither split nor "
                        "replicated evenly over it");
  }
  return "";
}

// Collects one rank's tensors, family by family differences and all, in the
// order of the forward pass.
class Builder {
 public:
  Builder(const ModelConfig& config, ShardPlan* plan)
      : config_(config), plan_(*plan), opt_(config.position == PositionKind::kLearned) {}

  void Build() {
    const bool tied = config_.tie_word_embeddings;
    Vocabulary("embedding.weight", "embed_tokens.weight", tied ? "lm_head.weight" : "");
    if (opt_) {
      Replicated("position.weight", Root("embed_positions.weight"),
                 config_.max_position_embeddings + config_.position_offset, config_.hidden_size);
    }
    const bool projected = config_.embedding_dim != config_.hidden_size;
    if (projected) {
      Replicated("project_in.weight", Root("project_in.weight"), config_.hidden_size,
                 config_.embedding_dim);
    }
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) Layer(layer);
    if (config_.final_norm) Norm("final_norm", Root(opt_ ? "final_layer_norm" : "norm"));
    if (projected) {
      Replicated("project_out.weight", Root("project_out.weight"), config_.embedding_dim,
                 config_.hidden_size);
    }
    if (!tied) Vocabulary("head.weight", "", "lm_head.weight");
  }

 private:
  using Names = std::vector<std::string>;

  // How a tensor of the model's trunk may be named: a base model saved on its
  // own lacks the "model." of a causal one.
  Names Root(const std::string& name) const {
    if (opt_) {
      return {absl::StrCat("model.decoder.", name), absl::StrCat("decoder.", name), name};
    }
    return {absl::StrCat("model.", name), name};
  }
  Names InLayer(const std::string& name) const {
    return Root(absl::StrCat("layers.", layer_, ".", name));
  }
  std::string Local(const std::string& name) const {
    return absl::StrCat("layers.", layer_, ".", name);
  }

  static TensorSlice Slice(const Names& names, int64_t rows, int64_t cols) {
    TensorSlice slice;
    slice.name = names.front();
    slice.alternatives.assign(names.begin() + 1, names.end());
    slice.rows = rows;
    slice.cols = cols;
    slice.row_end = rows;
    slice.col_end = cols;
    return slice;
  }
  static TensorSlice Rows(const Names& names, int64_t rows, int64_t cols, int64_t begin,
                          int64_t count) {
    TensorSlice slice = Slice(names, rows, cols);
    slice.row_begin = begin;
    slice.row_end = begin + count;
    return slice;
  }
  static TensorSlice Cols(const Names& names, int64_t rows, int64_t cols, int64_t begin,
                          int64_t count) {
    TensorSlice slice = Slice(names, rows, cols);
    slice.col_begin = begin;
    slice.col_end = begin + count;
    return slice;
  }

  void Add(std::string name, bool is_matrix, std::vector<TensorSlice> slices) {
    LocalTensor tensor;
    tensor.name = std::move(name);
    tensor.is_matrix = is_matrix;
    for (const TensorSlice& slice : slices) {
      tensor.rows += slice.row_end - slice.row_begin;
      tensor.cols = slice.col_end - slice.col_begin;
    }
    tensor.slices = std::move(slices);
    plan_.tensors.push_back(std::move(tensor));
  }

  void Replicated(std::string name, const Names& names, int64_t rows, int64_t cols) {
    Add(std::move(name), true, {Slice(names, rows, cols)});
  }
  void Vector(std::string name, const Names& names, int64_t size) {
    Add(std::move(name), false, {Slice(names, size, 1)});
  }

  static Names With(Names names, const char* suffix) {
    for (std::string& name : names) name += suffix;
    return names;
  }

  void Norm(const std::string& name, const Names& names) {
    if (!config_.norm_affine) return;
    Vector(name + ".weight", With(names, ".weight"), config_.hidden_size);
    if (config_.norm == NormKind::kLayer) {
      Vector(name + ".bias", With(names, ".bias"), config_.hidden_size);
    }
  }

  // This rank's rows of a [vocab_size, embedding_dim] matrix, then zero rows. A
  // rank past the end of a small vocabulary has zero rows alone.
  void Vocabulary(std::string name, const std::string& in_trunk, const std::string& outside) {
    Names names = in_trunk.empty() ? Names() : Root(in_trunk);
    if (!outside.empty()) names.push_back(outside);
    const int64_t begin = std::min(plan_.first_vocab, config_.vocab_size);
    const int64_t end = std::min(plan_.first_vocab + plan_.local_vocab, config_.vocab_size);
    LocalTensor tensor;
    tensor.name = std::move(name);
    tensor.rows = plan_.local_vocab;
    tensor.cols = config_.embedding_dim;
    if (begin < end) {
      tensor.slices = {Rows(names, config_.vocab_size, config_.embedding_dim, begin, end - begin)};
    }
    plan_.tensors.push_back(std::move(tensor));
  }

  void Layer(int64_t layer) {
    layer_ = layer;
    Norm(Local("input_norm"), InLayer(opt_ ? "self_attn_layer_norm" : "input_layernorm"));
    Attention();
    if (config_.sandwich_norms) {
      Norm(Local("post_attention_norm"), InLayer("post_attention_layernorm"));
    }
    Norm(Local("mlp_norm"), InLayer(opt_                     ? "final_layer_norm"
                                    : config_.sandwich_norms ? "pre_feedforward_layernorm"
                                                             : "post_attention_layernorm"));
    Mlp();
    if (config_.sandwich_norms) {
      Norm(Local("post_mlp_norm"), InLayer("post_feedforward_layernorm"));
    }
  }

  // Rows of q, then k, then v; cols: of the matrices, or 1 for the biases.
  std::vector<TensorSlice> QkvSlices(const char* suffix, int64_t cols) const {
    const int64_t dim = config_.head_dim;
    const auto rows = [&](const char* name, int64_t heads, int64_t first, int64_t count) {
      return Rows(With(InLayer(name), suffix), heads * dim, cols, first * dim, count * dim);
    };
    return {
        rows("self_attn.q_proj", config_.num_heads, plan_.first_head, plan_.local_heads),
        rows("self_attn.k_proj", config_.num_kv_heads, plan_.first_kv_head, plan_.local_kv_heads),
        rows("self_attn.v_proj", config_.num_kv_heads, plan_.first_kv_head, plan_.local_kv_heads)};
  }

  void Attention() {
    const int64_t dim = config_.head_dim;
    Add(Local("qkv.weight"), true, QkvSlices(".weight", config_.hidden_size));
    if (config_.qkv_bias) Add(Local("qkv.bias"), false, QkvSlices(".bias", 1));
    if (config_.qk_norm) {
      Vector(Local("q_norm.weight"), InLayer("self_attn.q_norm.weight"), dim);
      Vector(Local("k_norm.weight"), InLayer("self_attn.k_norm.weight"), dim);
    }
    const std::string o = opt_ ? "self_attn.out_proj" : "self_attn.o_proj";
    Add(Local("o.weight"), true,
        {Cols(InLayer(o + ".weight"), config_.hidden_size, config_.num_heads * dim,
              plan_.first_head * dim, plan_.local_heads * dim)});
    if (config_.attention_output_bias) {
      Vector(Local("o.bias"), InLayer(o + ".bias"), config_.hidden_size);
    }
  }

  TensorSlice Columns(const std::string& name, int64_t cols) const {
    return Rows(InLayer(name), config_.intermediate_size, cols,
                plan_.rank * plan_.local_intermediate, plan_.local_intermediate);
  }

  void Mlp() {
    const int64_t hidden = config_.hidden_size;
    if (config_.gated_mlp) {
      Add(Local("gate_up.weight"), true,
          {Columns("mlp.gate_proj.weight", hidden), Columns("mlp.up_proj.weight", hidden)});
      if (config_.mlp_bias) {
        Add(Local("gate_up.bias"), false,
            {Columns("mlp.gate_proj.bias", 1), Columns("mlp.up_proj.bias", 1)});
      }
    } else {
      Add(Local("up.weight"), true, {Columns("fc1.weight", hidden)});
      if (config_.mlp_bias) Add(Local("up.bias"), false, {Columns("fc1.bias", 1)});
    }
    const std::string down = config_.gated_mlp ? "mlp.down_proj" : "fc2";
    Add(Local("down.weight"), true,
        {Cols(InLayer(down + ".weight"), hidden, config_.intermediate_size,
              plan_.rank * plan_.local_intermediate, plan_.local_intermediate)});
    if (config_.mlp_bias) Vector(Local("down.bias"), InLayer(down + ".bias"), hidden);
  }

  const ModelConfig& config_;
  ShardPlan& plan_;
  const bool opt_;
  int64_t layer_ = 0;
};

std::string Range(std::string_view what, int64_t first, int64_t count, int64_t total) {
  if (count <= 0) return absl::StrCat(AbslView(what), " none of ", total);
  if (count == 1) return absl::StrCat(AbslView(what), " ", first, " of ", total);
  return absl::StrCat(AbslView(what), " ", first, "-", first + count - 1, " of ", total);
}

}  // namespace

absl::StatusOr<ShardPlan> MakeShardPlan(const ModelConfig& config, int64_t tp_size, int64_t rank) {
  if (const std::string why = WhyNot(config, tp_size); !why.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor parallel size ", tp_size, " cannot split this ", config.architecture, ": ", why,
        "; sizes that work: ", absl::StrJoin(ValidTpSizes(config, 64), ", ")));
  }
  if (rank < 0 || rank >= tp_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " is not below tensor parallel size ", tp_size));
  }
  ShardPlan plan;
  plan.tp_size = tp_size;
  plan.rank = rank;
  plan.local_heads = config.num_heads / tp_size;
  plan.first_head = rank * plan.local_heads;
  plan.local_kv_heads = std::max<int64_t>(1, config.num_kv_heads / tp_size);
  plan.first_kv_head = rank * config.num_kv_heads / tp_size;
  plan.local_intermediate = config.intermediate_size / tp_size;
  plan.local_vocab = (config.vocab_size + tp_size - 1) / tp_size;
  plan.padded_vocab = plan.local_vocab * tp_size;
  plan.first_vocab = rank * plan.local_vocab;
  plan.attention_slices = SlicesOf(config.num_heads);
  plan.mlp_slices = SlicesOf(config.intermediate_size);
  Builder(config, &plan).Build();
  return plan;
}

std::vector<int64_t> ValidTpSizes(const ModelConfig& config, int64_t limit) {
  std::vector<int64_t> sizes;
  for (int64_t tp = 1; tp <= std::min(limit, config.num_heads); ++tp) {
    if (WhyNot(config, tp).empty()) sizes.push_back(tp);
  }
  return sizes;
}

std::string DescribeShard(const ModelConfig& config, const ShardPlan& plan) {
  const int64_t vocab = std::min(plan.local_vocab, config.vocab_size - plan.first_vocab);
  return absl::StrCat(
      Range("heads", plan.first_head, plan.local_heads, config.num_heads), ", ",
      Range("kv heads", plan.first_kv_head, plan.local_kv_heads, config.num_kv_heads), ", ",
      Range("mlp columns", plan.rank * plan.local_intermediate, plan.local_intermediate,
            config.intermediate_size),
      ", ", Range("vocabulary", plan.first_vocab, vocab, config.vocab_size));
}

}  // namespace lockstep
