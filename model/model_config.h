// What a model is: config.json of a Hugging Face directory, read into the terms
// the forward pass uses. One struct for every family; where families differ,
// they differ by a value here, so that the decoder has no family switch.
//
// Anything that would change the maths and is not represented here is refused
// by name (InvalidArgument / Unimplemented), never ignored. Both spellings of
// rope settings are read (rope_theta + rope_scaling, and rope_parameters).
#ifndef LOCKSTEP_MODEL_MODEL_CONFIG_H_
#define LOCKSTEP_MODEL_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

// Bytes of one element.
int64_t DTypeBytes(DType dtype);
std::string_view DTypeName(DType dtype);  // "float32", "float16", "bfloat16", "float8_e4m3fn"
absl::StatusOr<DType> ParseDType(std::string_view name);

enum class NormKind { kRms, kLayer };  // RMSNorm; LayerNorm with bias
enum class Activation { kSilu, kGeluTanh, kGelu, kRelu };
enum class PositionKind {
  kRope,
  kLearned
};  // rotary; a table added to the embeddings (OPT, offset 2)
enum class RopeScalingKind { kNone, kLinear, kLlama3 };

struct RopeConfig {
  double theta = 10000.0;
  RopeScalingKind scaling = RopeScalingKind::kNone;
  double factor = 1.0;
  // llama3 only (the Llama 3.1 model card's frequency-dependent scaling):
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 0;
  bool operator==(const RopeConfig&) const = default;
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM"
  std::string model_type;    // "llama"
  // Of the checkpoint. Where config.json names none, LoadModelConfig looks at
  // the tensors beside it, and ParseModelConfig says float32.
  DType dtype = DType::kFloat32;
  bool dtype_given = false;  // by config.json
  std::string quantization;  // "" or "fp8" (per-tensor or per-channel; recognised for sizing)

  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t max_position_embeddings = 0;
  int64_t embedding_dim = 0;  // OPT's word_embed_proj_dim; otherwise hidden_size

  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool attention_output_bias = false;
  bool mlp_bias = false;
  bool gated_mlp = true;  // gate * up; false: fc1, activation, fc2
  bool qk_norm = false;   // RMSNorm over each head of q and k, before rotary
  bool sandwich_norms =
      false;                // Gemma 3: norms after attention and MLP too, before the residual add
  bool norm_before = true;  // false: OPT's do_layer_norm_before = false
  bool final_norm = true;

  NormKind norm = NormKind::kRms;
  bool norm_affine = true;  // false: norms have neither weight nor bias, and no tensors (OPT)
  double norm_eps = 1e-5;
  bool norm_weight_plus_one = false;  // Gemma: scale by 1 + w
  Activation activation = Activation::kSilu;
  PositionKind position = PositionKind::kRope;
  int64_t position_offset = 0;  // OPT: 2
  // Gemma: sqrt(hidden_size), exact. A backend whose activations have 16 bits rounds it to them.
  double embedding_scale = 1.0;
  double attention_scale = 0.0;  // 1/sqrt(head_dim) or 1/sqrt(query_pre_attn_scalar)

  RopeConfig rope;             // of full-attention layers
  RopeConfig rope_local;       // of sliding layers, where they differ (Gemma 3); else equal to rope
  int64_t sliding_window = 0;  // tokens a sliding layer sees, itself included; 0: no sliding layer
  std::vector<bool> sliding_layers;  // one a layer

  std::vector<uint32_t> eos_token_ids;  // of config.json alone
  std::optional<uint32_t> bos_token_id;
};

// Parses the text of config.json. `where` names the file in errors.
// Unimplemented: a family, key or value that is understood but not supported;
// InvalidArgument: anything that is not a config.json.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view where);

// Reads DIR/config.json; a path to the file itself will do.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir);

// "LlamaForCausalLM, MistralForCausalLM, ...": for messages.
std::string SupportedArchitectures();

enum class BackendKind { kCpu, kCuda };
std::string_view BackendName(BackendKind backend);  // "cpu", "cuda"

// Whether a backend can load this model, beyond its size being planned. Called
// at start, before any worker is asked to. Unimplemented names the field.
absl::Status CheckServable(const ModelConfig& config, BackendKind backend);

// --kv-cache-dtype: "auto" is the serving dtype's, "fp8" and "fp8_e4m3" one byte a value
// (float8_e4m3fn). Without a prefix that names the flag.
absl::StatusOr<DType> ParseKvCacheDType(std::string_view name, DType serving);
// Whether a backend can keep keys and values so. The flag is for the caller to name.
absl::Status CheckKvDType(DType kv_dtype, DType serving, BackendKind backend);

// Defaults for sampling and the ending tokens, from generation_config.json (absent: empty).
struct GenerationConfig {
  std::vector<uint32_t> eos_token_ids;
  std::optional<double> temperature, top_p, repetition_penalty;
  std::optional<int64_t> top_k;
};
absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::string& model_dir);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_MODEL_CONFIG_H_
