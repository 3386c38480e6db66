// What model_config.h refuses, and that the one line names the field.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_config.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::HasSubstr;

// One field changed, and what the refusal must say of it.
struct Refusal {
  const char* name;
  const char* base;  // a published config; "" for the tiny Llama
  json change;
  std::vector<std::string> says;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesTheFieldInOneLine) {
  const Refusal& refusal = GetParam();
  json config = *refusal.base == '\0' ? TinyLlamaJson() : PublishedJson(refusal.base);
  ASSERT_TRUE(Parse(config).ok());
  for (const auto& [key, value] : refusal.change.items()) config[key] = value;
  const absl::StatusOr<ModelConfig> c = Parse(config);
  ASSERT_FALSE(c.ok());
  EXPECT_THAT(Message(c.status()), testing::StartsWith("config.json: "));
  for (const std::string& text : refusal.says) {
    EXPECT_THAT(Message(c.status()), HasSubstr(text));
  }
  EXPECT_EQ(Message(c.status()).find('\n'), std::string::npos);
  EXPECT_LT(Message(c.status()).size(), 300u);
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusalTest,
    testing::Values(
        Refusal{"architecture",
                "",
                {{"architectures", {"MixtralForCausalLM"}}},
                {"MixtralForCausalLM", "LlamaForCausalLM", "OPTForCausalLM"}},
        Refusal{"multimodal",
                "",
                {{"architectures", {"Gemma3ForConditionalGeneration"}}},
                {"Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"}},
        Refusal{"two_architectures",
                "",
                {{"architectures", {"LlamaForCausalLM", "X"}}},
                {"architectures"}},
        Refusal{"model_type", "", {{"model_type", "mixtral"}}, {"mixtral", "llama"}},
        Refusal{"unknown_field", "", {{"num_experts", 8}}, {"num_experts", "8", "not known"}},
        Refusal{"unknown_number", "", {{"logit_scale", 0.5}}, {"logit_scale"}},
        Refusal{"cross_attention", "", {{"add_cross_attention", true}}, {"add_cross_attention"}},
        Refusal{"encoder_decoder", "", {{"is_encoder_decoder", true}}, {"is_encoder_decoder"}},
        Refusal{"not_causal", "", {{"is_causal", false}}, {"is_causal"}},
        Refusal{"yarn",
                "",
                {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}},
                {"rope_scaling.rope_type", "yarn", "default, linear, llama3"}},
        Refusal{
            "dynamic", "", {{"rope_scaling", {{"type", "dynamic"}, {"factor", 4.0}}}}, {"dynamic"}},
        Refusal{"rope_types",
                "",
                {{"rope_scaling", {{"type", "linear"}, {"rope_type", "llama3"}, {"factor", 2.0}}}},
                {"field rope_scaling.type is \"linear\" but rope_type is \"llama3\""}},
        Refusal{"rope_types_default",
                "",
                {{"rope_scaling", {{"type", "default"}, {"rope_type", "linear"}, {"factor", 2.0}}}},
                {"field rope_scaling.type is \"default\" but rope_type is \"linear\""}},
        Refusal{"rope_extra",
                "",
                {{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}, {"mscale", 0.7}}}},
                {"rope_scaling.mscale"}},
        Refusal{"linear_no_factor",
                "",
                {{"rope_scaling", {{"type", "linear"}}}},
                {"rope_scaling.factor", "missing"}},
        Refusal{"llama3_no_low",
                "llama-3.1-70b",
                {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}},
                {"low_freq_factor", "missing"}},
        Refusal{"llama3_order",
                "llama-3.1-70b",
                {{"rope_scaling",
                  {{"rope_type", "llama3"},
                   {"factor", 8.0},
                   {"low_freq_factor", 4.0},
                   {"high_freq_factor", 4.0},
                   {"original_max_position_embeddings", 8192}}}},
                {"high_freq_factor"}},
        Refusal{"rope_list", "", {{"rope_scaling", {1, 2}}}, {"rope_scaling", "an object"}},
        Refusal{"per_layer_rope",
                "",
                {{"rope_parameters", {{"full_attention", {{"rope_theta", 1.0}}}}}},
                {"rope_parameters.full_attention"}},
        Refusal{"unknown_layer_type",
                "gemma-3-1b",
                {{"rope_parameters",
                  {{"full_attention", {{"rope_type", "default"}}},
                   {"chunked_attention", {{"rope_type", "default"}}}}}},
                {"field rope_parameters.chunked_attention"}},
        Refusal{"rope_local_base",
                "gemma-3-1b",
                {{"rope_local_base_freq", 10000.0},
                 {"rope_parameters", {{"sliding_attention", {{"rope_theta", 20000.0}}}}}},
                {"field rope_parameters disagrees with rope_local_base_freq"}},
        Refusal{"partial_rotary",
                "",
                {{"partial_rotary_factor", 0.5}},
                {"partial_rotary_factor", "0.5"}},
        Refusal{"theta", "", {{"rope_theta", -1.0}}, {"rope_theta"}},
        Refusal{"activation", "", {{"hidden_act", "mish"}}, {"hidden_act", "mish", "silu"}},
        Refusal{"dtype", "", {{"torch_dtype", "float64"}}, {"torch_dtype", "float64", "bfloat16"}},
        Refusal{"dtypes", "", {{"dtype", "float16"}}, {"dtype", "torch_dtype"}},
        Refusal{"awq",
                "",
                {{"quantization_config", {{"quant_method", "awq"}, {"bits", 4}}}},
                {"quantization_config", "awq", "fp8"}},
        Refusal{"int8",
                "",
                {{"quantization_config",
                  {{"quant_method", "compressed-tensors"}, {"format", "int-quantized"}}}},
                {"int-quantized"}},
        Refusal{"sliding_llama", "", {{"sliding_window", 64}}, {"sliding_window"}},
        Refusal{"sliding_llama_layers",
                "",
                {{"layer_types", {"full_attention", "sliding_attention"}}},
                {"layer_types"}},
        Refusal{"soft_capping",
                "gemma-3-1b",
                {{"final_logit_softcapping", 30.0}},
                {"final_logit_softcapping", "30"}},
        Refusal{"attention_soft_capping",
                "gemma-3-1b",
                {{"attn_logit_softcapping", 50.0}},
                {"attn_logit_softcapping"}},
        Refusal{"bidirectional",
                "gemma-3-1b",
                {{"use_bidirectional_attention", true}},
                {"use_bidirectional_attention"}},
        Refusal{"gemma_no_window", "gemma-3-1b", {{"sliding_window", nullptr}}, {"sliding_window"}},
        Refusal{
            "gemma_window_of_itself", "gemma-3-1b", {{"sliding_window", 1}}, {"sliding_window"}},
        Refusal{"gemma_patterns",
                "gemma-3-1b",
                {{"_sliding_window_pattern", 5}},
                {"_sliding_window_pattern"}},
        Refusal{"window_zero", "mistral-7b-v0.1", {{"sliding_window", 0}}, {"sliding_window"}},
        Refusal{"opt_rope", "opt-125m", {{"rope_theta", 10000.0}}, {"rope_theta"}},
        Refusal{
            "opt_heads", "opt-125m", {{"num_attention_heads", 11}}, {"hidden_size", "768", "11"}},
        Refusal{"kv_heads", "", {{"num_key_value_heads", 3}}, {"num_attention_heads", "8", "3"}},
        Refusal{"hidden", "", {{"hidden_size", 33}}, {"hidden_size", "33", "head_dim"}},
        Refusal{"odd_head", "", {{"head_dim", 5}}, {"head_dim", "5", "even"}},
        Refusal{"zero_layers", "", {{"num_hidden_layers", 0}}, {"num_hidden_layers", "0"}},
        Refusal{"negative", "", {{"vocab_size", -5}}, {"vocab_size", "-5"}},
        Refusal{"huge", "", {{"intermediate_size", 1e18}}, {"intermediate_size"}},
        Refusal{"huge_unsigned", "", {{"hidden_size", 18446744073709551615u}}, {"hidden_size"}},
        Refusal{"fraction", "", {{"hidden_size", 32.5}}, {"hidden_size", "32.5"}},
        Refusal{"string_size", "", {{"hidden_size", "32"}}, {"hidden_size"}},
        Refusal{"bool_size", "", {{"num_hidden_layers", true}}, {"num_hidden_layers", "true"}},
        Refusal{"number_bool", "", {{"tie_word_embeddings", 1}}, {"tie_word_embeddings"}},
        Refusal{"null_size", "", {{"hidden_size", nullptr}}, {"hidden_size", "missing"}},
        Refusal{"eps", "", {{"rms_norm_eps", 0}}, {"rms_norm_eps"}},
        Refusal{"eos", "", {{"eos_token_id", {1, -2}}}, {"eos_token_id", "-2"}},
        Refusal{"eos_beyond_31_bits",
                "",
                {{"eos_token_id", 2147483648u}},
                {"eos_token_id", "2147483648", "a token id"}},
        Refusal{"eos_text", "", {{"eos_token_id", "</s>"}}, {"eos_token_id"}}),
    [](const testing::TestParamInfo<Refusal>& test) { return std::string(test.param.name); });

TEST(RefusalsTest, HostileTextIsRefusedInOneLine) {
  const std::string bomb = "{\"a\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}";
  const std::vector<std::string> texts = {"",
                                          "{",
                                          "[]",
                                          "null",
                                          "{\"a\":1,\"a\":2}",
                                          "{\"a\":{\"b\":1,\"b\":2}}",
                                          "{} {}",
                                          bomb,
                                          "{\"hidden_size\":NaN}",
                                          "{\"hidden_size\":1e999}",
                                          std::string("{\"a\":\0 1}", 9),
                                          TinyLlamaJson().dump() + std::string("\0x", 2),
                                          "{\"a\":\"\xff\xfe\"}",
                                          "{\"architectures\":\"LlamaForCausalLM\"}",
                                          "{\"architectures\":[\"a\\nb\\u0000c\"]}"};
  for (const std::string& text : texts) {
    const absl::StatusOr<ModelConfig> c = ParseModelConfig(text, "config.json");
    ASSERT_FALSE(c.ok()) << text.substr(0, 40);
    EXPECT_EQ(Message(c.status()).find_first_of(std::string("\n\0", 2)), std::string::npos);
    EXPECT_LT(Message(c.status()).size(), 300u);
  }
}

}  // namespace
}  // namespace lockstep
