#include "model/model_config.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/temp_dir.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(ModelConfigTest, ReadsLlama2) {
  const ModelConfig c = Published("llama-2-7b");
  EXPECT_EQ(c.architecture, "LlamaForCausalLM");
  EXPECT_EQ(c.dtype, DType::kFloat16);
  EXPECT_EQ(c.vocab_size, 32000);
  EXPECT_EQ(c.hidden_size, 4096);
  EXPECT_EQ(c.embedding_dim, 4096);
  EXPECT_EQ(c.num_layers, 32);
  EXPECT_EQ(c.num_kv_heads, 32);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_DOUBLE_EQ(c.attention_scale, 1 / std::sqrt(128.0));
  EXPECT_EQ(c.norm, NormKind::kRms);
  EXPECT_DOUBLE_EQ(c.norm_eps, 1e-5);
  EXPECT_EQ(c.activation, Activation::kSilu);
  EXPECT_EQ(c.rope, RopeConfig{});
  EXPECT_EQ(c.sliding_window, 0);
  EXPECT_EQ(c.sliding_layers, std::vector<bool>(32, false));
  EXPECT_FALSE(c.qkv_bias || c.attention_output_bias || c.mlp_bias || c.tie_word_embeddings);
  EXPECT_TRUE(c.gated_mlp && c.norm_before && c.final_norm && c.norm_affine);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(2));
  EXPECT_EQ(c.bos_token_id, 1u);
}

TEST(ModelConfigTest, ReadsLlama3RopeTiesAndEndTokens) {
  const ModelConfig c = Published("llama-3.2-1b");
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.rope.scaling, RopeScalingKind::kLlama3);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.factor, 32.0);
  EXPECT_EQ(c.rope.low_freq_factor, 1.0);
  EXPECT_EQ(c.rope.high_freq_factor, 4.0);
  EXPECT_EQ(c.rope.original_max_position_embeddings, 8192);
  EXPECT_EQ(c.rope_local, c.rope);
  EXPECT_THAT(c.eos_token_ids, ElementsAre(128001, 128008, 128009));
}

TEST(ModelConfigTest, LlamaBiasesFollowTheirFields) {
  json config = TinyLlamaJson();
  config["attention_bias"] = true;
  absl::StatusOr<ModelConfig> c = Parse(config);
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_TRUE(c->qkv_bias && c->attention_output_bias);
  EXPECT_FALSE(c->mlp_bias);
  config["mlp_bias"] = true;
  EXPECT_TRUE(Parse(config)->mlp_bias);
}

TEST(ModelConfigTest, HeadDimMayDifferFromHiddenOverHeads) {
  json config = TinyLlamaJson();
  config["head_dim"] = 16;
  EXPECT_EQ(Parse(config)->head_dim, 16);
  config["head_dim"] = nullptr;
  EXPECT_EQ(Parse(config)->head_dim, 4);
}

TEST(ModelConfigTest, MissingKvHeadsFollowTheFamily) {
  json config = TinyLlamaJson();
  config.erase("num_key_value_heads");
  EXPECT_EQ(Parse(config)->num_kv_heads, 8);
  config["architectures"] = {"MistralForCausalLM"};
  config["model_type"] = "mistral";
  config["num_attention_heads"] = 32;
  config["hidden_size"] = 128;
  EXPECT_EQ(Parse(config)->num_kv_heads, 8);
  config["num_key_value_heads"] = nullptr;
  EXPECT_EQ(Parse(config)->num_kv_heads, 32);
}

TEST(ModelConfigTest, MistralSlidesInEveryLayer) {
  ModelConfig c = Published("mistral-7b-v0.1");
  EXPECT_EQ(c.sliding_window, 4096);
  EXPECT_EQ(c.sliding_layers, std::vector<bool>(32, true));

  json config = PublishedJson("mistral-7b-v0.1");
  config["sliding_window"] = nullptr;
  c = *Parse(config);
  EXPECT_EQ(c.sliding_window, 0);
  EXPECT_EQ(c.sliding_layers, std::vector<bool>(32, false));

  config.erase("sliding_window");  // the family's default
  EXPECT_EQ(Parse(config)->sliding_window, 4096);
}

TEST(ModelConfigTest, QwenSlidesOnlyWhereTold) {
  ModelConfig c = Published("qwen2.5-7b");
  EXPECT_TRUE(c.qkv_bias);
  EXPECT_FALSE(c.attention_output_bias || c.qk_norm);
  EXPECT_EQ(c.sliding_window, 0);

  json config = PublishedJson("qwen2.5-7b");
  config["use_sliding_window"] = true;
  config["max_window_layers"] = 20;
  c = *Parse(config);
  EXPECT_EQ(c.sliding_window, 131072);
  for (size_t i = 0; i < 28; ++i) EXPECT_EQ(c.sliding_layers[i], i >= 20) << i;
}

TEST(ModelConfigTest, Qwen3NormsEachHead) {
  const ModelConfig c = Published("qwen3-8b");
  EXPECT_TRUE(c.qk_norm);
  EXPECT_FALSE(c.qkv_bias || c.attention_output_bias);
  EXPECT_EQ(c.head_dim, 128);
}

TEST(ModelConfigTest, Gemma3ScalesNormsAndAlternatesLayers) {
  const ModelConfig c = Published("gemma-3-1b");
  EXPECT_TRUE(c.tie_word_embeddings && c.qk_norm && c.sandwich_norms && c.norm_weight_plus_one);
  EXPECT_EQ(c.activation, Activation::kGeluTanh);
  EXPECT_DOUBLE_EQ(c.embedding_scale, std::sqrt(1152.0));
  EXPECT_DOUBLE_EQ(c.attention_scale, 1 / 16.0);
  EXPECT_EQ(c.rope.theta, 1e6);
  EXPECT_EQ(c.rope_local.theta, 1e4);
  EXPECT_EQ(c.sliding_window, 512);
  for (size_t i = 0; i < 26; ++i) EXPECT_EQ(c.sliding_layers[i], (i + 1) % 6 != 0) << i;
}

TEST(ModelConfigTest, Gemma3LocalRopeIsNotScaled) {
  json config = PublishedJson("gemma-3-1b");
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  const ModelConfig c = *Parse(config);
  EXPECT_EQ(c.rope.scaling, RopeScalingKind::kLinear);
  EXPECT_EQ(c.rope.factor, 8.0);
  EXPECT_EQ(c.rope_local.scaling, RopeScalingKind::kNone);
}

TEST(ModelConfigTest, BothSpellingsOfGemma3Agree) {
  json config = PublishedJson("gemma-3-1b");
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  const ModelConfig old_spelling = *Parse(config);
  for (const char* key : {"rope_scaling", "rope_theta", "rope_local_base_freq",
                          "sliding_window_pattern", "torch_dtype"}) {
    config.erase(key);
  }
  config["dtype"] = "bfloat16";
  config["_sliding_window_pattern"] = 6;
  config["rope_parameters"] = {
      {"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 1e6}}},
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
  const ModelConfig new_spelling = *Parse(config);
  EXPECT_EQ(new_spelling.rope, old_spelling.rope);
  EXPECT_EQ(new_spelling.rope_local, old_spelling.rope_local);
  EXPECT_EQ(new_spelling.sliding_layers, old_spelling.sliding_layers);
  EXPECT_EQ(new_spelling.dtype, old_spelling.dtype);
}

TEST(ModelConfigTest, BothSpellingsOfLlamaAgree) {
  json config = PublishedJson("llama-3.1-70b");
  const ModelConfig old_spelling = *Parse(config);
  json rope = config["rope_scaling"];
  rope["rope_theta"] = config["rope_theta"];
  config["rope_parameters"] = rope;
  EXPECT_EQ(Parse(config)->rope, old_spelling.rope);  // both, saying the same
  config.erase("rope_scaling");
  config.erase("rope_theta");
  EXPECT_EQ(Parse(config)->rope, old_spelling.rope);

  config["rope_theta"] = 1234.0;
  EXPECT_THAT(Message(Parse(config).status()), HasSubstr("disagrees with rope_theta"));
}

TEST(ModelConfigTest, LayerTypesDecideWhereGiven) {
  json config = PublishedJson("qwen3-8b");
  config["num_hidden_layers"] = 3;
  config["use_sliding_window"] = true;
  config["sliding_window"] = 64;
  config["layer_types"] = {"full_attention", "sliding_attention", "full_attention"};
  const ModelConfig c = *Parse(config);
  EXPECT_THAT(c.sliding_layers, ElementsAre(false, true, false));
  EXPECT_EQ(c.sliding_window, 64);

  config["use_sliding_window"] = false;
  EXPECT_THAT(Message(Parse(config).status()), HasSubstr("no sliding_window is in use"));
  config["layer_types"] = {"full_attention"};
  EXPECT_THAT(Message(Parse(config).status()), HasSubstr("1 entries for 3 layers"));
  config["layer_types"] = {"full_attention", "chunked_attention", "full_attention"};
  EXPECT_THAT(Message(Parse(config).status()), HasSubstr("chunked_attention"));
}

TEST(ModelConfigTest, ReadsOptWithBothNormOrders) {
  ModelConfig c = Published("opt-125m");
  EXPECT_EQ(c.position, PositionKind::kLearned);
  EXPECT_EQ(c.position_offset, 2);
  EXPECT_EQ(c.norm, NormKind::kLayer);
  EXPECT_EQ(c.activation, Activation::kRelu);
  EXPECT_EQ(c.intermediate_size, 3072);
  EXPECT_TRUE(c.tie_word_embeddings && c.norm_before && c.final_norm && c.norm_affine);
  EXPECT_TRUE(c.qkv_bias && c.attention_output_bias && c.mlp_bias);
  EXPECT_FALSE(c.gated_mlp);

  c = Published("opt-350m");
  EXPECT_FALSE(c.norm_before || c.final_norm);
  EXPECT_EQ(c.embedding_dim, 512);
  EXPECT_EQ(c.hidden_size, 1024);

  json config = PublishedJson("opt-125m");
  config["_remove_final_layer_norm"] = true;
  config["enable_bias"] = false;
  config["layer_norm_elementwise_affine"] = false;
  c = *Parse(config);
  EXPECT_FALSE(c.final_norm || c.qkv_bias || c.attention_output_bias || c.mlp_bias ||
               c.norm_affine);
}

TEST(ModelConfigTest, EveryPublishedConfigParses) {
  for (const char* name : {"codellama-34b", "yi-34b", "llama-3.1-405b", "smollm2-135m"}) {
    const absl::StatusOr<ModelConfig> config = LoadModelConfig(PublishedPath(name));
    EXPECT_TRUE(config.ok()) << config.status();
  }
}

// As such checkpoints write it.
json CompressedTensors(const char* strategy) {
  const json weights = {{"num_bits", 8},         {"type", "float"},
                        {"strategy", strategy},  {"symmetric", true},
                        {"dynamic", false},      {"block_structure", nullptr},
                        {"group_size", nullptr}, {"observer", "minmax"}};
  const json inputs = {{"num_bits", 8},
                       {"type", "float"},
                       {"strategy", "token"},
                       {"dynamic", true},
                       {"symmetric", true}};
  const json group = {{"targets", {"Linear"}}, {"weights", weights}, {"input_activations", inputs}};
  return {{"quant_method", "compressed-tensors"},
          {"format", "float-quantized"},
          {"quantization_status", "compressed"},
          {"kv_cache_scheme", nullptr},
          {"ignore", {"lm_head"}},
          {"config_groups", {{"group_0", group}}}};
}

TEST(ModelConfigTest, RecognisesFp8AndOnlyTheCpuBackendRefusesIt) {
  json config = PublishedJson("llama-3.1-405b");
  for (const json& quantization :
       {json{{"quant_method", "fp8"}}, json{{"quant_method", "fbgemm_fp8"}},
        json{{"quant_method", "compressed-tensors"}, {"format", "float-quantized"}},
        CompressedTensors("tensor"), CompressedTensors("channel")}) {
    config["quantization_config"] = quantization;
    const absl::StatusOr<ModelConfig> c = Parse(config);
    ASSERT_TRUE(c.ok()) << c.status();
    EXPECT_EQ(c->quantization, "fp8");
    EXPECT_THAT(Message(CheckServable(*c, BackendKind::kCpu)),
                AllOf(HasSubstr("quantization_config"), HasSubstr("bfloat16")));
    EXPECT_TRUE(CheckServable(*c, BackendKind::kCuda).ok());
  }
  EXPECT_TRUE(CheckServable(Published("llama-2-7b"), BackendKind::kCpu).ok());
}

TEST(ModelConfigTest, AFieldWithoutArchitecturesIsFoundByModelType) {
  json config = TinyLlamaJson();
  config.erase("architectures");
  EXPECT_EQ(Parse(config)->architecture, "LlamaForCausalLM");
  config["model_type"] = "bloom";
  EXPECT_THAT(Message(Parse(config).status()),
              AllOf(HasSubstr("bloom"), HasSubstr("Gemma3ForCausalLM")));
}

TEST(ModelConfigTest, FieldsThatChangeNothingAreAccepted) {
  json config = TinyLlamaJson();
  for (const char* key : {"_name_or_path", "transformers_version", "use_cache", "id2label",
                          "num_beams", "temperature", "attention_dropout", "auto_map"}) {
    config[key] = {{"some", "value"}};
  }
  config["rope_interleaved"] = false;  // unknown, but off
  config["brand_new"] = nullptr;
  config["brand_new_list"] = json::array();
  config["pretraining_tp"] = 4;
  const absl::StatusOr<ModelConfig> c = Parse(config);
  EXPECT_TRUE(c.ok()) << c.status();
}

TEST(ModelConfigTest, LoadsADirectoryOrTheFileItself) {
  TempDir dir;
  WriteFileOrDie(dir.File("config.json"), TinyLlamaJson().dump());
  EXPECT_EQ(LoadModelConfig(dir.path())->hidden_size, 32);
  EXPECT_EQ(LoadModelConfig(dir.path() + "/")->hidden_size, 32);
  EXPECT_EQ(LoadModelConfig(dir.File("config.json"))->hidden_size, 32);
  const absl::StatusOr<ModelConfig> missing = LoadModelConfig(dir.File("nothing"));
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(missing.status()), HasSubstr("nothing"));
}

TEST(ModelConfigTest, WithoutADTypeTheTensorsTell) {
  TempDir dir;
  json config = TinyLlamaJson();
  config.erase("torch_dtype");
  WriteFileOrDie(dir.File("config.json"), config.dump());
  EXPECT_EQ(LoadModelConfig(dir.path())->dtype, DType::kFloat32);
  SafetensorsWriter writer;
  writer.Add("norm", "F32", {2}, std::string(8, '\0'));
  writer.Add("matrix", "BF16", {2, 4}, std::string(16, '\0'));
  writer.WriteTo(dir.File("model.safetensors"));
  EXPECT_EQ(LoadModelConfig(dir.path())->dtype, DType::kBFloat16);
}

TEST(GenerationConfigTest, ReadsEndTokensAndSampling) {
  TempDir dir;
  EXPECT_TRUE(LoadGenerationConfig(dir.path())->eos_token_ids.empty());  // absent
  WriteFileOrDie(dir.File("generation_config.json"),
                 R"({"eos_token_id": [1, 106], "temperature": 0.6, "top_p": 0.9, "top_k": 20,
                     "repetition_penalty": 1.05, "do_sample": true, "max_length": 4096})");
  const absl::StatusOr<GenerationConfig> config = LoadGenerationConfig(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1, 106));
  EXPECT_EQ(config->temperature, 0.6);
  EXPECT_EQ(config->top_p, 0.9);
  EXPECT_EQ(config->top_k, 20);
  EXPECT_EQ(config->repetition_penalty, 1.05);

  // Greedy, and no limit, as such files write them.
  WriteFileOrDie(dir.File("generation_config.json"), R"({"temperature": 0, "top_k": -1})");
  const absl::StatusOr<GenerationConfig> greedy = LoadGenerationConfig(dir.path());
  ASSERT_TRUE(greedy.ok()) << greedy.status();
  EXPECT_EQ(greedy->temperature, 0.0);
  EXPECT_EQ(greedy->top_k, -1);

  WriteFileOrDie(dir.File("generation_config.json"), R"({"eos_token_id": "two"})");
  EXPECT_THAT(Message(LoadGenerationConfig(dir.path()).status()),
              AllOf(HasSubstr("generation_config.json"), HasSubstr("eos_token_id")));
}

TEST(DTypeTest, NamesRoundTrip) {
  for (const auto& [dtype, bytes] :
       std::vector<std::pair<DType, int64_t>>{{DType::kFloat32, 4},
                                              {DType::kFloat16, 2},
                                              {DType::kBFloat16, 2},
                                              {DType::kFloat8E4M3, 1}}) {
    EXPECT_EQ(*ParseDType(DTypeName(dtype)), dtype);
    EXPECT_EQ(DTypeBytes(dtype), bytes);
  }
  EXPECT_FALSE(ParseDType("int8").ok());
}

}  // namespace
}  // namespace lockstep
