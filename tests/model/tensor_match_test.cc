#include "model/tensor_match.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/temp_dir.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

using Tensors = std::map<std::string, std::vector<int64_t>>;

absl::Status Match(const json& config_json, const Tensors& tensors) {
  const TempDir dir;
  const ModelConfig config = *Parse(config_json);
  SafetensorsWriter writer;
  AddTensors(tensors, &writer);
  writer.WriteTo(dir.File("model.safetensors"));
  const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir.path());
  if (!checkpoint.ok()) return checkpoint.status();
  return MatchCheckpoint(**checkpoint, config);
}

Tensors TinyTensors() { return StoredTensors(*Parse(TinyLlamaJson())); }

TEST(TensorMatchTest, AcceptsWhatTheConfigAsksFor) {
  EXPECT_TRUE(Match(TinyLlamaJson(), TinyTensors()).ok());
}

TEST(TensorMatchTest, NamesAMissingTensorAndTheFile) {
  Tensors tensors = TinyTensors();
  tensors.erase("model.layers.1.self_attn.k_proj.weight");
  const absl::Status status = Match(TinyLlamaJson(), tensors);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("model.safetensors"),
                                     HasSubstr("model.layers.1.self_attn.k_proj.weight")));
}

TEST(TensorMatchTest, NamesAWrongShape) {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{31, 32}, {32, 33}, {32}, {32, 32, 1}, {1024}}) {
    Tensors tensors = TinyTensors();
    tensors["model.layers.0.self_attn.o_proj.weight"] = shape;
    EXPECT_THAT(
        Message(Match(TinyLlamaJson(), tensors)),
        AllOf(HasSubstr("o_proj.weight"), HasSubstr("[32, 32]"), HasSubstr("model.safetensors")));
  }
  Tensors tensors = TinyTensors();
  tensors["model.norm.weight"] = {33};
  EXPECT_THAT(Message(Match(TinyLlamaJson(), tensors)), HasSubstr("[32]"));
}

TEST(TensorMatchTest, NamesADTypeThatIsNoWeight) {
  const TempDir dir;
  const ModelConfig config = *Parse(TinyLlamaJson());
  Tensors tensors = TinyTensors();
  tensors.erase("model.norm.weight");
  SafetensorsWriter writer;
  AddTensors(tensors, &writer);
  writer.Add("model.norm.weight", "I32", {32}, std::string(128, '\0'));
  writer.WriteTo(dir.File("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT(Message(MatchCheckpoint(**checkpoint, config)),
              AllOf(HasSubstr("model.norm.weight"), HasSubstr("I32"), HasSubstr("BF16")));
}

TEST(TensorMatchTest, BuffersAndUnusedHeadsAreNoMatter) {
  Tensors tensors = TinyTensors();
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {2};
  tensors["model.layers.7.self_attn.q_proj.bias"] = {32};  // beyond this model's layers
  EXPECT_TRUE(Match(TinyLlamaJson(), tensors).ok());
  json tied = TinyLlamaJson();
  tied["tie_word_embeddings"] = true;
  EXPECT_TRUE(Match(tied, tensors).ok());  // with a head that repeats the embedding
}

TEST(TensorMatchTest, ABiasThatWouldBeLeftOutIsRefused) {
  for (const char* name :
       {"model.layers.1.self_attn.q_proj.bias", "model.layers.0.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_norm.weight"}) {
    Tensors tensors = TinyTensors();
    tensors[name] = {32};
    EXPECT_THAT(Message(Match(TinyLlamaJson(), tensors)),
                AllOf(HasSubstr(name), HasSubstr("model.safetensors")));
  }
}

TEST(TensorMatchTest, BaseModelNamesAndTiedHeadsAreFound) {
  json config = TinyLlamaJson();
  config["tie_word_embeddings"] = true;
  Tensors bare;
  for (const auto& [name, shape] : StoredTensors(*Parse(config))) {
    bare[name.substr(std::string("model.").size())] = shape;
  }
  EXPECT_TRUE(Match(config, bare).ok());
  bare["lm_head.weight"] = bare["embed_tokens.weight"];
  bare.erase("embed_tokens.weight");
  EXPECT_TRUE(Match(config, bare).ok());
}

TEST(TensorMatchTest, OldOptNamesAreFound) {
  json config = PublishedJson("opt-350m");
  config["num_hidden_layers"] = 1;
  config["hidden_size"] = 32;
  config["ffn_dim"] = 48;
  config["num_attention_heads"] = 4;
  config["vocab_size"] = 20;
  config["max_position_embeddings"] = 8;
  config["word_embed_proj_dim"] = 16;
  Tensors old_names;
  for (const auto& [name, shape] : StoredTensors(*Parse(config))) {
    EXPECT_EQ(name.rfind("model.decoder.", 0), 0u) << name;
    old_names[name.substr(std::string("model.").size())] = shape;
  }
  EXPECT_TRUE(Match(config, old_names).ok());
}

}  // namespace
}  // namespace lockstep
