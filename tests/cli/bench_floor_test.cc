// Floors against figures worked out from the models' published shapes.
#include <string>

#include "cli/bench/floor.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

constexpr Hardware kH200 = {4.3e12, 770e12, 1350e12};

ModelConfig Llama(int64_t layers, int64_t hidden, int64_t heads, int64_t intermediate,
                  bool tied = false) {
  const std::string text =
      R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":128256,)"
      R"("num_key_value_heads":8,"max_position_embeddings":131072,"rms_norm_eps":1e-5,)"
      R"("hidden_act":"silu","torch_dtype":"bfloat16","num_hidden_layers":)" +
      std::to_string(layers) + ",\"hidden_size\":" + std::to_string(hidden) +
      ",\"num_attention_heads\":" + std::to_string(heads) +
      ",\"intermediate_size\":" + std::to_string(intermediate) +
      ",\"tie_word_embeddings\":" + (tied ? "true" : "false") + "}";
  absl::StatusOr<ModelConfig> config = ParseModelConfig(text, "test");
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : ModelConfig();
}

ModelConfig Llama8B() { return Llama(32, 4096, 32, 14336); }
ModelConfig Llama70B() { return Llama(80, 8192, 64, 28672); }

Floor Make(const ModelConfig& config, const std::string& quantization, int64_t tp_size,
           DType kv_dtype = DType::kBFloat16) {
  absl::StatusOr<Floor> floor =
      Floor::Make(config, DType::kBFloat16, kv_dtype, quantization, tp_size, kH200);
  EXPECT_TRUE(floor.ok()) << floor.status();
  return *floor;
}

// Half the bytes a token of context, and the same weights.
TEST(Floor, KeysAndValuesOfOneByteAreReadFaster) {
  const Floor sixteen = Make(Llama8B(), "fp8", 1);
  const Floor eight = Make(Llama8B(), "fp8", 1, DType::kFloat8E4M3);
  EXPECT_EQ(eight.weight_bytes(), sixteen.weight_bytes());
  EXPECT_EQ(eight.DecodeBytes(1, 1) - eight.DecodeBytes(1, 0), 64 * 1024);
  EXPECT_EQ(2 * (eight.DecodeBytes(256, 1500) - eight.weight_bytes()),
            sixteen.DecodeBytes(256, 1500) - sixteen.weight_bytes());
  EXPECT_GT(eight.ThroughputTokensPerSecond(1000, 256, 1000, 1000),
            1.3 * sixteen.ThroughputTokensPerSecond(1000, 256, 1000, 1000));
}

// 15.0 GB of weights a token (the embedding is not read whole) and 128 KiB of
// keys and values a token of context.
TEST(Floor, OfDecodingAnEightBillionModel) {
  const Floor floor = Make(Llama8B(), "", 1);
  EXPECT_NEAR(static_cast<double>(floor.weight_bytes()), 15.0e9, 0.02e9);
  EXPECT_EQ(floor.DecodeBytes(1, 1) - floor.DecodeBytes(1, 0), 128 * 1024);
  EXPECT_NEAR(floor.DecodeSeconds(1, 1024) * 1e3, 3.52, 0.04);
  EXPECT_NEAR(floor.DecodeSeconds(16, 1024) * 1e3, 3.99, 0.04);
}

TEST(Floor, IsDividedByTheRanks) {
  EXPECT_NEAR(Make(Llama8B(), "", 4).DecodeSeconds(1, 1024) * 1e3, 0.88, 0.02);
  EXPECT_NEAR(Make(Llama70B(), "", 4).DecodeSeconds(1, 1024) * 1e3, 8.1, 0.1);
}

TEST(Floor, HalvesTheLayersWithEightBitWeights) {
  EXPECT_NEAR(Make(Llama8B(), "fp8", 1).DecodeSeconds(1, 1024) * 1e3, 1.9, 0.06);
}

TEST(Floor, CountsATiedEmbeddingOnceAsTheHead) {
  const int64_t apart = Make(Llama8B(), "", 1).weight_bytes();
  const int64_t tied = Make(Llama(32, 4096, 32, 14336, true), "", 1).weight_bytes();
  EXPECT_EQ(apart, tied);
}

TEST(Floor, OfPrefillIsArithmetic) {
  // 2 x 7 G parameters x 6,144 tokens, and attention, at 770 TFLOP/s.
  EXPECT_NEAR(Make(Llama8B(), "", 1).PrefillSeconds(1, 6144) * 1e3, 126, 8);
  EXPECT_NEAR(Make(Llama8B(), "", 4).PrefillSeconds(1, 6144) * 1e3, 31, 2);
  // A short prompt still reads the weights once.
  EXPECT_NEAR(Make(Llama8B(), "", 1).PrefillSeconds(1, 1) * 1e3, 3.49, 0.04);
}

TEST(Floor, OfPrefillMultipliesEightBitMatricesFaster) {
  // 2 x 7 G parameters x 6,144 tokens at 1,350 TFLOP/s, attention still at 770.
  EXPECT_NEAR(Make(Llama8B(), "fp8", 1).PrefillSeconds(1, 6144) * 1e3, 63.5 + 12.9, 0.5);
  // Without a rate of their own they are as fast as the others.
  const absl::StatusOr<Floor> one_rate =
      Floor::Make(Llama8B(), DType::kBFloat16, DType::kBFloat16, "fp8", 1, {4.3e12, 770e12});
  ASSERT_TRUE(one_rate.ok());
  EXPECT_EQ(one_rate->PrefillSeconds(1, 6144), Make(Llama8B(), "", 1).PrefillSeconds(1, 6144));
}

TEST(Quantization, IsTheLastFlagsAndWithoutOneTheCheckpoints) {
  ModelConfig config = Llama8B();
  EXPECT_EQ(Quantization(config, "", {}), "");
  EXPECT_EQ(Quantization(config, "fp8", {}), "fp8");
  EXPECT_EQ(Quantization(config, "", {"--max-num-seqs", "4", "--quantization", "fp8"}), "fp8");
  EXPECT_EQ(Quantization(config, "", {"--quantization=fp8"}), "fp8");
  EXPECT_EQ(Quantization(config, "x", {"--quantization=y", "--quantization", "fp8"}), "fp8");
  config.quantization = "fp8";
  EXPECT_EQ(Quantization(config, "", {"--max-num-seqs", "4"}), "fp8");
}

TEST(Floor, WithoutAnArithmeticRateIsOneReadOfTheWeights) {
  const absl::StatusOr<Floor> floor =
      Floor::Make(Llama8B(), DType::kBFloat16, DType::kBFloat16, "", 1, {.bytes_per_s = 4.3e12});
  ASSERT_TRUE(floor.ok());
  EXPECT_NEAR(floor->PrefillSeconds(64, 6144) * 1e3, 3.49, 0.04);
}

TEST(Floor, BoundsThroughputByReadsAndPrefill) {
  const Floor floor = Make(Llama8B(), "", 1);
  const double all_at_once = floor.ThroughputTokensPerSecond(512, 512, 1000, 1000);
  EXPECT_GT(all_at_once, 12e3);
  EXPECT_LT(all_at_once, 30e3);
  EXPECT_LT(floor.ThroughputTokensPerSecond(512, 64, 1000, 1000), all_at_once);
}

TEST(Floor, RefusesATensorParallelSizeThatCannotWork) {
  EXPECT_FALSE(Floor::Make(Llama8B(), DType::kBFloat16, DType::kBFloat16, "", 3, kH200).ok());
}

}  // namespace
}  // namespace lockstep
