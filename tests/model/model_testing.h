// What the model tests share: published configs, configs changed by a key, and
// checkpoints written for a config.
#ifndef LOCKSTEP_TESTS_MODEL_MODEL_TESTING_H_
#define LOCKSTEP_TESTS_MODEL_MODEL_TESTING_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/file.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/safetensors_writer.h"

namespace lockstep {

inline std::string PublishedPath(std::string_view name) {
  return absl::StrCat(LOCKSTEP_SOURCE_DIR, "/tests/model/configs/", std::string(name), ".json");
}

// The file's fields, for a test to change some of.
inline nlohmann::json PublishedJson(std::string_view name) {
  const absl::StatusOr<std::string> text = ReadSmallFile(PublishedPath(name), 1 << 20);
  LOCKSTEP_CHECK(text.ok());
  return nlohmann::json::parse(*text);
}

inline ModelConfig Published(std::string_view name) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(PublishedPath(name));
  EXPECT_TRUE(config.ok()) << config.status();
  LOCKSTEP_CHECK(config.ok());
  return *std::move(config);
}

inline absl::StatusOr<ModelConfig> Parse(const nlohmann::json& json) {
  return ParseModelConfig(json.dump(), "config.json");
}

// A small Llama that every test may shrink or bend further.
inline nlohmann::json TinyLlamaJson() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", 50},
          {"hidden_size", 32},
          {"intermediate_size", 48},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"max_position_embeddings", 128},
          {"torch_dtype", "float32"}};
}

// The stored tensors a config asks for: name -> shape.
inline std::map<std::string, std::vector<int64_t>> StoredTensors(const ModelConfig& config) {
  const absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, 1, 0);
  LOCKSTEP_CHECK(plan.ok());
  std::map<std::string, std::vector<int64_t>> tensors;
  for (const LocalTensor& tensor : plan->tensors) {
    for (const TensorSlice& slice : tensor.slices) {
      tensors[slice.name] = tensor.is_matrix ? std::vector<int64_t>{slice.rows, slice.cols}
                                             : std::vector<int64_t>{slice.rows};
    }
  }
  return tensors;
}

// Float32 tensors whose every element is different within the tensor.
inline void AddTensors(const std::map<std::string, std::vector<int64_t>>& tensors,
                       SafetensorsWriter* writer) {
  for (const auto& [name, shape] : tensors) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
    writer->Add(name, "F32", shape, FloatBytes(values));
  }
}

inline std::string Message(const absl::Status& status) { return std::string(status.message()); }

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_MODEL_MODEL_TESTING_H_
