// Every tiny model of tests/golden, as transformers saved it: its config parses
// and its tensors are what the shard plan asks for, at each tensor parallel size.
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "model/tensor_match.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> GoldenModels() {
  std::vector<std::string> models;
  for (const auto& entry :
       fs::directory_iterator(std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden")) {
    if (fs::exists(entry.path() / "config.json")) models.push_back(entry.path().string());
  }
  return models;
}

TEST(GoldenModelsTest, EveryFamilyIsThere) {
  std::set<std::string> architectures;
  for (const std::string& dir : GoldenModels()) {
    const absl::StatusOr<ModelConfig> config = LoadModelConfig(dir);
    ASSERT_TRUE(config.ok()) << config.status();
    architectures.insert(config->architecture);
    EXPECT_TRUE(LoadGenerationConfig(dir).ok()) << dir;
    EXPECT_TRUE(CheckServable(*config, BackendKind::kCpu).ok()) << dir;
  }
  EXPECT_EQ(architectures.size(), 6u);
}

TEST(GoldenModelsTest, TensorsMatchTheShardPlan) {
  for (const std::string& dir : GoldenModels()) {
    SCOPED_TRACE(dir);
    const ModelConfig config = *LoadModelConfig(dir);
    const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const absl::Status matched = MatchCheckpoint(**checkpoint, config);
    EXPECT_TRUE(matched.ok()) << matched;
    for (const int64_t tp_size : {1, 2, 4}) {
      for (int64_t rank = 0; rank < tp_size; ++rank) {
        const absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, tp_size, rank);
        ASSERT_TRUE(plan.ok()) << plan.status();
        for (const LocalTensor& tensor : plan->tensors) {
          for (const TensorSlice& slice : tensor.slices) {
            const absl::StatusOr<const TensorInfo*> info = MatchTensor(**checkpoint, slice);
            ASSERT_TRUE(info.ok()) << info.status();
            EXPECT_EQ((*info)->dtype, config.dtype) << slice.name;
          }
        }
      }
    }
  }
}

// transformers stores every parameter once: nothing in a file is left unread.
TEST(GoldenModelsTest, TheShardPlanLeavesNoStoredTensorOut) {
  for (const std::string& dir : GoldenModels()) {
    SCOPED_TRACE(dir);
    const std::unique_ptr<Checkpoint> checkpoint = *Checkpoint::Open(dir);
    std::set<const TensorInfo*> used;
    const ShardPlan plan = *MakeShardPlan(*LoadModelConfig(dir), 1, 0);
    for (const LocalTensor& tensor : plan.tensors) {
      for (const TensorSlice& slice : tensor.slices) {
        used.insert(*MatchTensor(*checkpoint, slice));
      }
    }
    for (const auto& [name, info] : checkpoint->tensors()) {
      EXPECT_TRUE(used.contains(&info)) << name;
    }
  }
}

}  // namespace
}  // namespace lockstep
