#include "model/shard_plan.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const LocalTensor* FindTensor(const ShardPlan& plan, const std::string& name) {
  for (const LocalTensor& tensor : plan.tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

int64_t Elements(const ShardPlan& plan) {
  int64_t elements = 0;
  for (const LocalTensor& tensor : plan.tensors) elements += tensor.rows * tensor.cols;
  return elements;
}

TEST(ShardPlanTest, OneRankHoldsThePublishedNumberOfParameters) {
  const std::vector<std::pair<const char*, int64_t>> published = {
      {"llama-2-7b", 6'738'415'616},      {"llama-2-13b", 13'015'864'320},
      {"codellama-34b", 33'743'970'304},  {"yi-34b", 34'388'917'248},
      {"llama-3.1-70b", 70'553'706'496},  {"llama-3.1-405b", 405'853'388'800},
      {"llama-3.2-1b", 1'235'814'400},    {"smollm2-135m", 134'515'008},
      {"mistral-7b-v0.1", 7'241'732'096}, {"qwen2.5-7b", 7'615'616'512},
      {"qwen3-8b", 8'190'735'360},        {"gemma-3-1b", 999'885'952},
      {"opt-125m", 125'239'296},          {"opt-350m", 331'196'416},
  };
  for (const auto& [name, parameters] : published) {
    EXPECT_EQ(Elements(*MakeShardPlan(Published(name), 1, 0)), parameters) << name;
  }
}

TEST(ShardPlanTest, FusesAndCutsALlamaLayer) {
  const ModelConfig config = *Parse(TinyLlamaJson());
  const ShardPlan plan = *MakeShardPlan(config, 2, 1);
  EXPECT_EQ(plan.local_heads, 4);
  EXPECT_EQ(plan.first_head, 4);
  EXPECT_EQ(plan.local_kv_heads, 2);
  EXPECT_EQ(plan.first_kv_head, 2);
  EXPECT_EQ(plan.local_intermediate, 24);
  EXPECT_EQ(plan.padded_vocab, 50);
  EXPECT_EQ(plan.local_vocab, 25);
  EXPECT_EQ(plan.first_vocab, 25);

  const LocalTensor* qkv = FindTensor(plan, "layers.1.qkv.weight");
  ASSERT_NE(qkv, nullptr);
  EXPECT_EQ(qkv->rows, 16 + 8 + 8);
  EXPECT_EQ(qkv->cols, 32);
  ASSERT_EQ(qkv->slices.size(), 3u);
  EXPECT_EQ(qkv->slices[0].name, "model.layers.1.self_attn.q_proj.weight");
  EXPECT_THAT(qkv->slices[0].alternatives, ElementsAre("layers.1.self_attn.q_proj.weight"));
  EXPECT_EQ(qkv->slices[0].row_begin, 16);
  EXPECT_EQ(qkv->slices[0].row_end, 32);
  EXPECT_EQ(qkv->slices[1].name, "model.layers.1.self_attn.k_proj.weight");
  EXPECT_EQ(qkv->slices[1].rows, 16);
  EXPECT_EQ(qkv->slices[1].row_begin, 8);
  EXPECT_EQ(qkv->slices[2].name, "model.layers.1.self_attn.v_proj.weight");

  const LocalTensor* o = FindTensor(plan, "layers.1.o.weight");
  EXPECT_EQ(o->rows, 32);
  EXPECT_EQ(o->cols, 16);
  EXPECT_EQ(o->slices[0].col_begin, 16);
  EXPECT_EQ(o->slices[0].row_end, 32);

  const LocalTensor* gate_up = FindTensor(plan, "layers.0.gate_up.weight");
  EXPECT_EQ(gate_up->rows, 48);
  EXPECT_EQ(gate_up->slices[0].name, "model.layers.0.mlp.gate_proj.weight");
  EXPECT_EQ(gate_up->slices[1].name, "model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(gate_up->slices[1].row_begin, 24);

  EXPECT_FALSE(FindTensor(plan, "layers.0.mlp_norm.weight")->is_matrix);
  EXPECT_EQ(FindTensor(plan, "layers.0.mlp_norm.weight")->slices[0].name,
            "model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(FindTensor(plan, "final_norm.weight")->slices[0].name, "model.norm.weight");
  EXPECT_EQ(FindTensor(plan, "head.weight")->slices[0].name, "lm_head.weight");
  EXPECT_EQ(FindTensor(plan, "layers.0.qkv.bias"), nullptr);
  EXPECT_EQ(FindTensor(plan, "layers.0.post_mlp_norm.weight"), nullptr);
}

TEST(ShardPlanTest, RowParallelBiasIsWholeOnEveryRank) {
  json config = TinyLlamaJson();
  config["attention_bias"] = config["mlp_bias"] = true;
  for (int64_t rank : {0, 1, 2, 3}) {
    const ShardPlan plan = *MakeShardPlan(*Parse(config), 4, rank);
    EXPECT_EQ(FindTensor(plan, "layers.0.o.bias")->rows, 32);
    EXPECT_EQ(FindTensor(plan, "layers.0.down.bias")->rows, 32);
    EXPECT_EQ(FindTensor(plan, "layers.0.qkv.bias")->rows, (2 + 1 + 1) * 4);
    EXPECT_EQ(FindTensor(plan, "layers.0.gate_up.bias")->rows, 2 * 12);
    EXPECT_FALSE(FindTensor(plan, "layers.0.qkv.bias")->is_matrix);
  }
}

TEST(ShardPlanTest, KvHeadsAreReplicatedBeyondTheirNumber) {
  json config = TinyLlamaJson();
  config["num_key_value_heads"] = 2;
  std::vector<int64_t> first;
  for (int64_t rank = 0; rank < 8; ++rank) {
    const ShardPlan plan = *MakeShardPlan(*Parse(config), 8, rank);
    EXPECT_EQ(plan.local_kv_heads, 1);
    // The head of K and V that this rank's query head attends to.
    EXPECT_EQ(plan.first_kv_head, plan.first_head / 4);
    first.push_back(plan.first_kv_head);
  }
  EXPECT_THAT(first, ElementsAre(0, 0, 0, 0, 1, 1, 1, 1));
}

TEST(ShardPlanTest, VocabularyIsPaddedWithRowsThatNoSliceCovers) {
  json config = TinyLlamaJson();
  config["vocab_size"] = 5;
  std::vector<int64_t> covered;
  for (int64_t rank = 0; rank < 4; ++rank) {
    const ShardPlan plan = *MakeShardPlan(*Parse(config), 4, rank);
    EXPECT_EQ(plan.padded_vocab, 8);
    const LocalTensor* embedding = FindTensor(plan, "embedding.weight");
    EXPECT_EQ(embedding->rows, 2);
    EXPECT_EQ(embedding->cols, 32);
    EXPECT_TRUE(embedding->is_matrix);
    int64_t rows = 0;
    for (const TensorSlice& slice : embedding->slices) rows += slice.row_end - slice.row_begin;
    covered.push_back(rows);
  }
  EXPECT_THAT(covered, ElementsAre(2, 2, 1, 0));
}

TEST(ShardPlanTest, ATiedModelHasNoHeadAndTakesEitherName) {
  json config = TinyLlamaJson();
  config["tie_word_embeddings"] = true;
  const ShardPlan plan = *MakeShardPlan(*Parse(config), 1, 0);
  EXPECT_EQ(FindTensor(plan, "head.weight"), nullptr);
  EXPECT_THAT(FindTensor(plan, "embedding.weight")->slices[0].alternatives,
              testing::Contains("lm_head.weight"));
}

TEST(ShardPlanTest, GemmaHasFourNormsALayer) {
  const ShardPlan plan = *MakeShardPlan(Published("gemma-3-1b"), 4, 3);
  const auto stored = [&](const std::string& name) {
    const LocalTensor* tensor = FindTensor(plan, "layers.3." + name);
    return tensor == nullptr ? "none" : tensor->slices[0].name;
  };
  EXPECT_EQ(stored("input_norm.weight"), "model.layers.3.input_layernorm.weight");
  EXPECT_EQ(stored("post_attention_norm.weight"), "model.layers.3.post_attention_layernorm.weight");
  EXPECT_EQ(stored("mlp_norm.weight"), "model.layers.3.pre_feedforward_layernorm.weight");
  EXPECT_EQ(stored("post_mlp_norm.weight"), "model.layers.3.post_feedforward_layernorm.weight");
  EXPECT_EQ(stored("q_norm.weight"), "model.layers.3.self_attn.q_norm.weight");
  EXPECT_EQ(FindTensor(plan, "layers.3.k_norm.weight")->rows, 256);
}

TEST(ShardPlanTest, OptProjectsAndAddsPositions) {
  const ShardPlan plan = *MakeShardPlan(Published("opt-350m"), 4, 1);
  const LocalTensor* position = FindTensor(plan, "position.weight");
  EXPECT_EQ(position->rows, 2050);
  EXPECT_EQ(position->cols, 1024);
  EXPECT_EQ(position->slices[0].name, "model.decoder.embed_positions.weight");
  EXPECT_THAT(position->slices[0].alternatives,
              testing::Contains("decoder.embed_positions.weight"));
  EXPECT_EQ(FindTensor(plan, "project_in.weight")->rows, 1024);
  EXPECT_EQ(FindTensor(plan, "project_in.weight")->cols, 512);
  EXPECT_EQ(FindTensor(plan, "project_out.weight")->rows, 512);
  EXPECT_EQ(FindTensor(plan, "embedding.weight")->cols, 512);
  EXPECT_EQ(FindTensor(plan, "final_norm.weight"), nullptr);
  EXPECT_EQ(FindTensor(plan, "layers.0.up.weight")->rows, 1024);
  EXPECT_EQ(FindTensor(plan, "layers.0.up.bias")->rows, 1024);
  EXPECT_EQ(FindTensor(plan, "layers.0.down.weight")->cols, 1024);
  EXPECT_EQ(FindTensor(plan, "layers.0.mlp_norm.bias")->slices[0].name,
            "model.decoder.layers.0.final_layer_norm.bias");

  json config = PublishedJson("opt-125m");
  config["layer_norm_elementwise_affine"] = false;
  const ShardPlan bare = *MakeShardPlan(*Parse(config), 1, 0);
  EXPECT_EQ(FindTensor(bare, "layers.0.input_norm.weight"), nullptr);
  EXPECT_EQ(FindTensor(bare, "final_norm.weight"), nullptr);
}

TEST(ShardPlanTest, RefusesASizeThatCannotWorkWithTheSizesThatCan) {
  const ModelConfig smollm = Published("smollm2-135m");  // 9 heads, 3 KV heads
  EXPECT_THAT(ValidTpSizes(smollm, 8), ElementsAre(1, 3));
  EXPECT_THAT(ValidTpSizes(smollm, 64), ElementsAre(1, 3));
  const absl::Status refused = MakeShardPlan(smollm, 2, 0).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(refused), AllOf(HasSubstr("tensor parallel size 2"),
                                      HasSubstr("9 attention heads"), HasSubstr("work: 1, 3")));
  EXPECT_THAT(Message(MakeShardPlan(smollm, 9, 0).status()),
              AllOf(HasSubstr("1536 MLP columns"), HasSubstr("1, 3")));

  json config = TinyLlamaJson();
  config["num_attention_heads"] = 24;
  config["hidden_size"] = 96;
  config["num_key_value_heads"] = 4;
  EXPECT_THAT(Message(MakeShardPlan(*Parse(config), 6, 0).status()), HasSubstr("4 KV heads"));
  EXPECT_FALSE(MakeShardPlan(*Parse(config), 0, 0).ok());
  EXPECT_FALSE(MakeShardPlan(*Parse(config), -2, 0).ok());
  EXPECT_FALSE(MakeShardPlan(*Parse(config), 2, 2).ok());
  EXPECT_FALSE(MakeShardPlan(*Parse(config), 2, -1).ok());
}

TEST(ShardPlanTest, SlicesOfASumDivideWholeHeadsAndColumns) {
  const auto slices = [](const char* name) {
    const ShardPlan plan = *MakeShardPlan(Published(name), 1, 0);
    return std::pair(plan.attention_slices, plan.mlp_slices);
  };
  EXPECT_EQ(slices("llama-2-7b"), std::pair(int64_t{8}, int64_t{8}));
  EXPECT_EQ(slices("opt-125m"), std::pair(int64_t{4}, int64_t{8}));      // 12 heads
  EXPECT_EQ(slices("smollm2-135m"), std::pair(int64_t{1}, int64_t{8}));  // 9 heads
}

TEST(ShardPlanTest, DescribesAShare) {
  const ModelConfig config = *Parse(TinyLlamaJson());
  EXPECT_EQ(DescribeShard(config, *MakeShardPlan(config, 4, 3)),
            "heads 6-7 of 8, kv heads 3 of 4, mlp columns 36-47 of 48, vocabulary 39-49 of 50");
  json tiny = TinyLlamaJson();
  tiny["vocab_size"] = 5;
  EXPECT_THAT(DescribeShard(*Parse(tiny), *MakeShardPlan(*Parse(tiny), 4, 3)),
              HasSubstr("vocabulary none of 5"));
}

// A config of any family with sizes of no particular merit.
ModelConfig RandomConfig(std::mt19937* random) {
  const auto pick = [&](std::vector<int64_t> choices) {
    return choices[(*random)() % choices.size()];
  };
  const int64_t kv_heads = pick({1, 2, 3, 4, 8});
  const int64_t heads = kv_heads * pick({1, 2, 3, 4});
  const int64_t dim = pick({2, 4, 6});
  json config = {
      {"vocab_size", pick({1, 7, 50, 64, 131})}, {"hidden_size", heads * dim},
      {"num_hidden_layers", pick({1, 2, 3})},    {"num_attention_heads", heads},
      {"max_position_embeddings", 16},           {"tie_word_embeddings", pick({0, 1}) == 1}};
  const int64_t intermediate = pick({8, 12, 24, 30, 48});
  if (pick({0, 1, 2, 3}) == 0) {
    config["architectures"] = {"OPTForCausalLM"};
    config["ffn_dim"] = intermediate;
    config["word_embed_proj_dim"] = pick({heads * dim, 5});
    config["enable_bias"] = pick({0, 1}) == 1;
    config["do_layer_norm_before"] = pick({0, 1}) == 1;
  } else {
    config["intermediate_size"] = intermediate;
    config["num_key_value_heads"] = kv_heads;
    config["head_dim"] = dim + 2;
    const std::vector<const char*> families = {"LlamaForCausalLM", "MistralForCausalLM",
                                               "Qwen2ForCausalLM", "Qwen3ForCausalLM",
                                               "Gemma3ForCausalLM"};
    const size_t family = (*random)() % families.size();
    config["architectures"] = {families[family]};
    if (family == 0) config["attention_bias"] = config["mlp_bias"] = pick({0, 1}) == 1;
  }
  absl::StatusOr<ModelConfig> parsed = Parse(config);
  LOCKSTEP_CHECK(parsed.ok());
  return *std::move(parsed);
}

// Times each element of each stored tensor is held, over all ranks.
using Coverage = std::map<std::string, std::vector<int>>;

void Cover(const ShardPlan& plan, Coverage* coverage) {
  for (const LocalTensor& tensor : plan.tensors) {
    int64_t rows = 0;
    for (const TensorSlice& slice : tensor.slices) {
      ASSERT_LE(0, slice.row_begin);
      ASSERT_LT(slice.row_begin, slice.row_end);
      ASSERT_LE(slice.row_end, slice.rows);
      ASSERT_LE(0, slice.col_begin);
      ASSERT_LE(slice.col_end, slice.cols);
      ASSERT_EQ(slice.col_end - slice.col_begin, tensor.cols) << tensor.name;
      rows += slice.row_end - slice.row_begin;
      std::vector<int>& counts = (*coverage)[slice.name];
      counts.resize(static_cast<size_t>(slice.rows * slice.cols));
      for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
        for (int64_t col = slice.col_begin; col < slice.col_end; ++col) {
          ++counts[static_cast<size_t>(row * slice.cols + col)];
        }
      }
    }
    ASSERT_LE(rows, tensor.rows) << tensor.name;
    const bool padded = tensor.name == "embedding.weight" || tensor.name == "head.weight";
    if (!padded) {
      ASSERT_EQ(rows, tensor.rows) << tensor.name;
    }
  }
}

// How often every element of a stored tensor must be held.
int ExpectedCopies(const ModelConfig& config, const std::string& name, int64_t tp_size) {
  const auto has = [&](const char* text) { return name.find(text) != std::string::npos; };
  if (has(".k_proj.") || has(".v_proj.")) {
    return static_cast<int>(std::max<int64_t>(1, tp_size / config.num_kv_heads));
  }
  const bool row_parallel_bias =
      has("o_proj.bias") || has("out_proj.bias") || has("down_proj.bias") || has("fc2.bias");
  const bool split =
      has("_proj.") || has("fc1.") || has("fc2.") || has("embed_tokens.") || has("lm_head.");
  return split && !row_parallel_bias ? 1 : static_cast<int>(tp_size);
}

TEST(ShardPlanTest, AllRanksTogetherHoldEveryElementAsOftenAsTheyShould) {
  std::mt19937 random(20240607);
  int checked = 0;
  for (int i = 0; i < 150; ++i) {
    const ModelConfig config = RandomConfig(&random);
    Coverage whole;
    Cover(*MakeShardPlan(config, 1, 0), &whole);
    for (const int64_t tp_size : ValidTpSizes(config, 12)) {
      SCOPED_TRACE(config.architecture + " at tp " + std::to_string(tp_size));
      Coverage coverage;
      std::set<std::pair<int64_t, int64_t>> shapes;
      for (int64_t rank = 0; rank < tp_size; ++rank) {
        const ShardPlan plan = *MakeShardPlan(config, tp_size, rank);
        ASSERT_NO_FATAL_FAILURE(Cover(plan, &coverage));
        shapes.emplace(Elements(plan), static_cast<int64_t>(plan.tensors.size()));
      }
      EXPECT_EQ(shapes.size(), 1u) << "ranks differ in size";
      ASSERT_EQ(coverage.size(), whole.size());
      for (const auto& [name, counts] : coverage) {
        const int copies = ExpectedCopies(config, name, tp_size);
        ASSERT_TRUE(
            std::all_of(counts.begin(), counts.end(), [&](int count) { return count == copies; }))
            << name << " should be held " << copies << " times";
        ++checked;
      }
    }
  }
  EXPECT_GT(checked, 5000);
}

}  // namespace
}  // namespace lockstep
