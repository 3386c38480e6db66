#include "model/families.h"

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/json.h"
#include "model/rope_config.h"
#include "model/strings.h"

namespace lockstep {
namespace {

// Far above any model there is, and small enough that the bytes of a whole model
// stay within 63 bits.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxHidden = int64_t{1} << 18;
constexpr int64_t kMaxIntermediate = int64_t{1} << 21;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 2048;
constexpr int64_t kMaxPositions = int64_t{1} << 31;

struct ActivationName {
  std::string_view name;
  Activation activation;
};
constexpr ActivationName kActivations[] = {
    {"silu", Activation::kSilu},         {"swish", Activation::kSilu},
    {"gelu", Activation::kGelu},         {"gelu_pytorch_tanh", Activation::kGeluTanh},
    {"gelu_new", Activation::kGeluTanh}, {"gelu_fast", Activation::kGeluTanh},
    {"relu", Activation::kRelu},
};

Activation ReadActivation(ConfigReader& reader, std::string_view key, std::string_view fallback) {
  const std::string name = reader.String(key, fallback);
  for (const ActivationName& known : kActivations) {
    if (name == known.name) return known.activation;
  }
  reader.FailUnsupported(key, absl::StrCat("is \"", Printable(name),
                                           "\"; supported: silu, swish, gelu, gelu_new, "
                                           "gelu_fast, gelu_pytorch_tanh, relu"));
  return Activation::kSilu;
}

// The sizes under the names that all families but OPT use. default_kv_heads and
// default_head_dim 0: num_attention_heads, and hidden_size / num_attention_heads.
void ReadSizes(ConfigReader& reader, ModelConfig& config, int64_t default_max_positions,
               int64_t default_kv_heads, int64_t default_head_dim) {
  config.vocab_size = reader.Int("vocab_size", std::nullopt, 1, kMaxVocab);
  config.hidden_size = reader.Int("hidden_size", std::nullopt, 1, kMaxHidden);
  config.embedding_dim = config.hidden_size;
  config.intermediate_size = reader.Int("intermediate_size", std::nullopt, 1, kMaxIntermediate);
  config.num_layers = reader.Int("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  config.num_heads = reader.Int("num_attention_heads", std::nullopt, 1, kMaxHeads);
  config.max_position_embeddings =
      reader.Int("max_position_embeddings", default_max_positions, 1, kMaxPositions);
  // A null is not the same as an absent field: it asks for one KV head a head.
  const bool default_kv = !reader.Has("num_key_value_heads") && default_kv_heads > 0;
  config.num_kv_heads = reader.Int("num_key_value_heads",
                                   default_kv ? default_kv_heads : config.num_heads, 1, kMaxHeads);
  const bool default_dim = !reader.Has("head_dim") && default_head_dim > 0;
  const int64_t derived_dim = config.hidden_size / config.num_heads;
  if (!reader.HasValue("head_dim") && !default_dim && config.hidden_size % config.num_heads != 0) {
    reader.FailInvalid(
        "hidden_size",
        absl::StrCat("is ", config.hidden_size, ", not a multiple of num_attention_heads ",
                     config.num_heads, ", and head_dim is not given"));
  }
  config.head_dim =
      reader.Int("head_dim", default_dim ? default_head_dim : derived_dim, 1, kMaxHeadDim);
  if (reader.ok() && config.head_dim % 2 != 0) {
    reader.FailInvalid("head_dim", absl::StrCat("is ", config.head_dim,
                                                "; rotary embeddings need an even number"));
  }
  if (reader.ok() && config.num_heads % config.num_kv_heads != 0) {
    reader.FailInvalid(
        "num_attention_heads",
        absl::StrCat("is ", config.num_heads, ", not a multiple of num_key_value_heads ",
                     config.num_kv_heads));
  }
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
}

// RMSNorm, rotary positions and a gated MLP: what all families but OPT share.
void ReadModernCommon(ConfigReader& reader, ModelConfig& config) {
  config.norm_eps = reader.Number("rms_norm_eps", 1e-6, 0, 1);
  config.sliding_layers.assign(static_cast<size_t>(config.num_layers), false);
}

// layer_types, where the file has it; else `sliding` decides for each layer.
// Sets sliding_window to the window given where at least one layer slides.
template <typename SlidingLayer>
void ReadLayerTypes(ConfigReader& reader, ModelConfig& config, int64_t window,
                    SlidingLayer sliding) {
  const std::vector<std::string> types = reader.Strings("layer_types");
  const bool given = !types.empty();
  if (given && types.size() != config.sliding_layers.size()) {
    reader.FailInvalid("layer_types", absl::StrCat("has ", types.size(), " entries for ",
                                                   config.num_layers, " layers"));
    return;
  }
  for (size_t i = 0; i < config.sliding_layers.size(); ++i) {
    if (given && types[i] != "full_attention" && types[i] != "sliding_attention") {
      reader.FailUnsupported("layer_types",
                             absl::StrCat("has \"", Printable(types[i]),
                                          "\"; supported: full_attention, sliding_attention"));
      return;
    }
    config.sliding_layers[i] =
        given ? types[i] == "sliding_attention" : sliding(static_cast<int64_t>(i));
    if (config.sliding_layers[i]) config.sliding_window = window;
    if (config.sliding_layers[i] && window == 0) {
      reader.FailInvalid("layer_types", "has sliding_attention, but no sliding_window is in use");
      return;
    }
  }
}

// 0: null, or absent with no default.
int64_t ReadWindow(ConfigReader& reader, int64_t fallback_when_absent) {
  const bool absent = !reader.Has("sliding_window");
  // Of 1 position, its own, no model is.
  return reader.Int("sliding_window", absent ? fallback_when_absent : 0,
                    reader.HasValue("sliding_window") ? 2 : 0, kMaxPositions);
}

void ReadLlama(ConfigReader& reader, ModelConfig& config) {
  ReadSizes(reader, config, 2048, 0, 0);
  ReadModernCommon(reader, config);
  config.activation = ReadActivation(reader, "hidden_act", "silu");
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  config.qkv_bias = config.attention_output_bias = reader.Bool("attention_bias", false);
  config.mlp_bias = reader.Bool("mlp_bias", false);
  config.rope = config.rope_local = ReadRope(reader, 10000.0);
  ReadLayerTypes(reader, config, 0, [](int64_t) { return false; });
  // How many pieces a product was computed in when training: the sum is the same.
  reader.Int("pretraining_tp", 1, 1, kMaxHeads);
}

void ReadMistral(ConfigReader& reader, ModelConfig& config) {
  ReadSizes(reader, config, 131072, 8, 0);
  ReadModernCommon(reader, config);
  config.activation = ReadActivation(reader, "hidden_act", "silu");
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  config.rope = config.rope_local = ReadRope(reader, 10000.0);
  const int64_t window = ReadWindow(reader, 4096);
  ReadLayerTypes(reader, config, window, [&](int64_t) { return window > 0; });
}

// Qwen2 and Qwen3: layers from max_window_layers on slide, if any do.
void ReadQwenWindow(ConfigReader& reader, ModelConfig& config) {
  const bool use_window = reader.Bool("use_sliding_window", false);
  const int64_t given = ReadWindow(reader, 4096);
  const int64_t window = use_window ? given : 0;
  const int64_t first = reader.Int("max_window_layers", 28, 0, kMaxPositions);
  ReadLayerTypes(reader, config, window, [&](int64_t i) { return window > 0 && i >= first; });
}

void ReadQwen2(ConfigReader& reader, ModelConfig& config) {
  ReadSizes(reader, config, 32768, 32, 0);
  ReadModernCommon(reader, config);
  config.activation = ReadActivation(reader, "hidden_act", "silu");
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  config.qkv_bias = true;
  config.rope = config.rope_local = ReadRope(reader, 10000.0);
  ReadQwenWindow(reader, config);
}

void ReadQwen3(ConfigReader& reader, ModelConfig& config) {
  ReadSizes(reader, config, 32768, 32, 128);
  ReadModernCommon(reader, config);
  config.activation = ReadActivation(reader, "hidden_act", "silu");
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  config.qkv_bias = config.attention_output_bias = reader.Bool("attention_bias", false);
  config.qk_norm = true;
  config.rope = config.rope_local = ReadRope(reader, 10000.0);
  ReadQwenWindow(reader, config);
}

void ReadGemma3(ConfigReader& reader, ModelConfig& config) {
  ReadSizes(reader, config, 131072, 4, 256);
  ReadModernCommon(reader, config);
  config.activation = ReadActivation(reader, "hidden_activation", "gelu_pytorch_tanh");
  if (reader.HasValue("hidden_act") &&
      ReadActivation(reader, "hidden_act", "") != config.activation) {
    reader.FailInvalid("hidden_act", "disagrees with hidden_activation");
  }
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", true);
  config.qkv_bias = config.attention_output_bias = reader.Bool("attention_bias", false);
  config.qk_norm = true;
  config.sandwich_norms = true;
  config.norm_weight_plus_one = true;
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  config.attention_scale = 1.0 / std::sqrt(reader.Number("query_pre_attn_scalar", 256.0, 0, 1e9));
  reader.RequireNull("attn_logit_softcapping", "soft-capping is not supported");
  reader.RequireNull("final_logit_softcapping", "soft-capping is not supported");
  reader.RequireBool("use_bidirectional_attention", false);
  const LayerTypeRopes ropes = ReadLayerTypeRopes(reader, 1e6, 10000.0);
  config.rope = ropes.full;
  config.rope_local = ropes.sliding;
  // Every pattern-th layer sees everything; the spelling changed between versions.
  const int64_t old_pattern = reader.Int("sliding_window_pattern", 6, 1, kMaxLayers);
  const int64_t pattern = reader.Int("_sliding_window_pattern", old_pattern, 1, kMaxLayers);
  if (reader.HasValue("sliding_window_pattern") && pattern != old_pattern) {
    reader.FailInvalid("_sliding_window_pattern", "disagrees with sliding_window_pattern");
  }
  ReadLayerTypes(reader, config, ReadWindow(reader, 4096),
                 [&](int64_t i) { return (i + 1) % pattern != 0; });
}

void ReadOpt(ConfigReader& reader, ModelConfig& config) {
  config.vocab_size = reader.Int("vocab_size", std::nullopt, 1, kMaxVocab);
  config.hidden_size = reader.Int("hidden_size", std::nullopt, 1, kMaxHidden);
  config.embedding_dim = reader.Int("word_embed_proj_dim", config.hidden_size, 1, kMaxHidden);
  config.intermediate_size = reader.Int("ffn_dim", std::nullopt, 1, kMaxIntermediate);
  config.num_layers = reader.Int("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  config.num_heads = reader.Int("num_attention_heads", std::nullopt, 1, kMaxHeads);
  config.num_kv_heads = config.num_heads;
  config.max_position_embeddings = reader.Int("max_position_embeddings", 2048, 1, int64_t{1} << 24);
  if (config.hidden_size % config.num_heads != 0) {
    reader.FailInvalid("hidden_size",
                       absl::StrCat("is ", config.hidden_size,
                                    ", not a multiple of num_attention_heads ", config.num_heads));
  }
  config.head_dim = config.hidden_size / config.num_heads;
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  config.sliding_layers.assign(static_cast<size_t>(config.num_layers), false);
  config.position = PositionKind::kLearned;
  config.position_offset = 2;
  config.gated_mlp = false;
  config.activation = ReadActivation(reader, "activation_function", "relu");
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", true);
  const bool bias = reader.Bool("enable_bias", true);
  config.qkv_bias = config.attention_output_bias = config.mlp_bias = bias;
  config.norm = NormKind::kLayer;
  config.norm_eps = 1e-5;
  config.norm_affine = reader.Bool("layer_norm_elementwise_affine", true);
  config.norm_before = reader.Bool("do_layer_norm_before", true);
  config.final_norm = config.norm_before && !reader.Bool("_remove_final_layer_norm", false);
}

constexpr Family kFamilies[] = {
    {"LlamaForCausalLM", "llama", &ReadLlama},
    {"MistralForCausalLM", "mistral", &ReadMistral},
    {"Qwen2ForCausalLM", "qwen2", &ReadQwen2},
    {"Qwen3ForCausalLM", "qwen3", &ReadQwen3},
    {"Gemma3ForCausalLM", "gemma3_text", &ReadGemma3},
    {"OPTForCausalLM", "opt", &ReadOpt},
};

}  // namespace

absl::Span<const Family> Families() { return kFamilies; }

}  // namespace lockstep
