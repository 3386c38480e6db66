// What a rank on a GPU says that it takes, beside what the memory model predicts.
#include <gtest/gtest.h>

#include <cstdio>
#include <optional>
#include <string>

#include "model/memory_model.h"
#include "tests/gpu/on_gpu.h"

namespace lockstep {
namespace {

constexpr char kConfig[] = R"({
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
  "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
  "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false})";

TEST(GpuMemory, PartsAreWhatTheMemoryModelPredicts) {
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(kConfig, "test");
  ASSERT_TRUE(config.ok()) << config.status();
  for (const char* quantization : {"", "fp8"}) {
    const DType kv_dtype = *quantization == 0 ? DType::kBFloat16 : DType::kFloat8E4M3;
    GroupOptions options = OnGpu(DType::kBFloat16, true, quantization, kv_dtype);
    options.num_kv_blocks = 1'024;
    options.max_num_seqs = 64;
    options.max_batched_tokens = 2'048;
    options.max_model_len = 2'048;
    ServingShape shape;
    shape.dtype = DType::kBFloat16;
    shape.kv_dtype = kv_dtype;
    shape.quantization = quantization;
    shape.block_size = options.block_size;
    shape.max_num_seqs = options.max_num_seqs;
    shape.max_batched_tokens = options.max_batched_tokens;
    shape.max_model_len = options.max_model_len;
    const auto predicted = PredictRankMemory(*config, shape, 1, 0, BackendKind::kCuda);
    ASSERT_TRUE(predicted.ok()) << predicted.status();
    const auto group = GroupRunner::Dummy(*config, options);
    ASSERT_TRUE(group.ok()) << group.status();
    const Backend& backend = (*group)->decoder(0).backend();
    EXPECT_EQ(backend.kv_bytes(), predicted->kv_bytes_per_token * 1'024 * options.block_size);
    ASSERT_TRUE(backend.activation_bytes().has_value());
    const auto activations = static_cast<double>(*backend.activation_bytes());
    const auto expected = static_cast<double>(predicted->activation_bytes);
    EXPECT_LE(activations, 1.05 * expected);
    EXPECT_GE(activations, 0.9 * expected);
    // Absent where the driver tells no memory before there is a context.
    const std::optional<int64_t> runtime = backend.runtime_bytes();
    if (runtime.has_value()) EXPECT_GT(*runtime, 0);
    std::printf(
        "\"%s\": activations %.0f MiB (predicted %.0f), runtime %.0f MiB (predicted %.0f)\n",
        quantization, activations / (1 << 20), expected / (1 << 20),
        static_cast<double>(runtime.value_or(0)) / (1 << 20),
        static_cast<double>(predicted->runtime_bytes) / (1 << 20));
  }
}

}  // namespace
}  // namespace lockstep
