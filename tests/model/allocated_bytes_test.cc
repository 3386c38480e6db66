// What the memory model predicts for weights is what a worker allocates.
#include <filesystem>
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "tests/model/model_testing.h"
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
