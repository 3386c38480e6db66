// What the memory model predicts for weights is what a worker allocates.
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "tests/model/model_testing.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/thread_pool.h"
#include "worker/weights.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

TEST(AllocatedBytesTest, EqualThePredictedForEveryGoldenModelAndSplit) {
  ThreadPool pool(2);
  int loaded = 0;
  for (const auto& entry :
       fs::directory_iterator(std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden")) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    SCOPED_TRACE(entry.path().string());
    const ModelConfig config = *LoadModelConfig(entry.path().string());
    const std::unique_ptr<Checkpoint> checkpoint = *Checkpoint::Open(entry.path().string());
    for (const DType dtype : kDTypes) {
      ServingShape shape;
      shape.dtype = dtype;
      shape.max_model_len = 128;
      for (const int64_t tp_size : {1, 2, 4}) {
        for (int64_t rank = 0; rank < tp_size; ++rank) {
          const ShardPlan plan = *MakeShardPlan(config, tp_size, rank);
          WeightOptions options;
          options.dtype = dtype;
          const auto weights = Weights::Load(*checkpoint, plan, options, &pool);
          ASSERT_TRUE(weights.ok()) << weights.status();
          const auto memory = PredictRankMemory(config, shape, tp_size, rank, BackendKind::kCpu);
          ASSERT_TRUE(memory.ok()) << memory.status();
          EXPECT_EQ((*weights)->allocated_bytes(), memory->weight_bytes);
          EXPECT_EQ(WeightBytes(plan, dtype, ""), memory->weight_bytes);
          ++loaded;
        }
      }
    }
  }
  EXPECT_GE(loaded, 6 * 3 * 7);
}

// The model counts on 16 threads and whole tiles of the widest processor: no less is
// taken than a little below what it says, and never more.
TEST(AllocatedBytesTest, OfTheCpuBackendArePredictedPartByPart) {
  ThreadPool pool(16);
  for (const char* name : {"llama", "gemma3", "opt_post_norm_projected", "qwen3_tied_f16"}) {
    const ModelConfig config =
        *LoadModelConfig(std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/" + name);
    for (const int64_t tokens : {64, 2048}) {
      ServingShape shape;
      shape.max_num_seqs = 8;
      shape.max_batched_tokens = tokens;
      shape.max_model_len = 100;
      for (const int64_t tp_size : {1, 2, 4}) {
        for (int64_t rank = 0; rank < tp_size; ++rank) {
          SCOPED_TRACE(absl::StrCat(name, ", ", tokens, " tokens, rank ", rank, " of ", tp_size));
          const ShardPlan plan = *MakeShardPlan(config, tp_size, rank);
          const BackendLimits limits = {.max_num_seqs = 8,
                                        .max_batched_tokens = static_cast<uint32_t>(tokens),
                                        .max_model_len = 100,
                                        .block_size = 16,
                                        .num_kv_blocks = 20};
          auto backend = MakeCpuBackend(config, plan, *Weights::Dummy(plan, config, {}, &pool),
                                        limits, shape.dtype, &pool);
          ASSERT_TRUE(backend.ok()) << backend.status();
          const RankMemory memory =
              *PredictRankMemory(config, shape, tp_size, rank, BackendKind::kCpu);
          EXPECT_EQ((*backend)->weight_bytes(), memory.weight_bytes);
          EXPECT_EQ((*backend)->kv_bytes(), 20 * 16 * memory.kv_bytes_per_token);
          EXPECT_EQ((*backend)->runtime_bytes(), memory.runtime_bytes);
          const int64_t activations = (*backend)->activation_bytes().value();
          EXPECT_LE(activations, memory.activation_bytes);
          EXPECT_GE(activations, memory.activation_bytes * 98 / 100);
        }
      }
    }
  }
}

TEST(AllocatedBytesTest, EqualThePredictedWhereTheVocabularyIsPadded) {
  ThreadPool pool(1);
  nlohmann::json json = TinyLlamaJson();
  json["vocab_size"] = 5;  // the last of four ranks holds padding alone
  const ModelConfig config = *Parse(json);
  for (int64_t rank = 0; rank < 4; ++rank) {
    const ShardPlan plan = *MakeShardPlan(config, 4, rank);
    WeightOptions options;
    options.dtype = DType::kBFloat16;
    const auto weights = Weights::Dummy(plan, config, options, &pool);
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ((*weights)->allocated_bytes(), WeightBytes(plan, DType::kBFloat16, ""));
  }
}

}  // namespace
}  // namespace lockstep
