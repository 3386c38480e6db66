// What a start with given flags comes to, before and after workers are there.
#include "coordinator/serving_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint64_t kGiB = uint64_t{1} << 30;

constexpr char kConfig[] = R"({
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
  "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
  "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
  "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
  "bos_token_id": 1, "eos_token_id": 2})";

class ServingPlanTest : public ::testing::Test {
 protected:
  ServingPlanTest() {
    directory_ = absl::StrCat(::testing::TempDir(), "/plan-", getpid(), "/tiny");
    std::filesystem::create_directories(directory_);
    WriteConfig(kConfig);
    options_.model = directory_;
  }
  ~ServingPlanTest() override {
    std::filesystem::remove_all(std::filesystem::path(directory_).parent_path());
  }
  void WriteConfig(const std::string& text) { std::ofstream(directory_ + "/config.json") << text; }
  std::string Error() {
    const absl::StatusOr<ServingPlan> plan = PlanServing(options_);
    EXPECT_FALSE(plan.ok());
    const std::string message(plan.status().message());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  }
  absl::StatusOr<GroupSizes> Sizes(const std::vector<WorkerMemory>& workers) {
    const absl::StatusOr<ServingPlan> plan = PlanServing(options_);
    if (!plan.ok()) return plan.status();
    return SizeGroup(*plan, options_, workers);
  }

  std::string directory_;
  CoordinatorOptions options_;
};

TEST_F(ServingPlanTest, RefusesACheckpointThatTheBackendCannotLoad) {
  std::string config = kConfig;
  config.insert(1, R"("quantization_config": {"quant_method": "fp8"}, )");
  WriteConfig(config);
  EXPECT_THAT(Error(), AllOf(HasSubstr("quantization_config"), HasSubstr("cpu backend")));
}

TEST_F(ServingPlanTest, FillsInWhatTheFlagsLeaveOpen) {
  const absl::StatusOr<ServingPlan> plan = PlanServing(options_);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->served_name, "tiny");
  EXPECT_EQ(plan->shape.dtype, DType::kFloat32);
  EXPECT_EQ(plan->scheduler.max_model_len, 1024u);
  EXPECT_EQ(plan->scheduler.max_batched_tokens, 2048u);
  EXPECT_EQ(plan->scheduler.vocab_size, 512u);
  EXPECT_EQ(plan->predicted.size(), 1u);
}

TEST_F(ServingPlanTest, NamesTheDirectoryWhateverItsSpelling) {
  options_.model = directory_ + "/";
  EXPECT_EQ(PlanServing(options_)->served_name, "tiny");
  options_.model = directory_ + "/../tiny/.";
  EXPECT_EQ(PlanServing(options_)->served_name, "tiny");
  options_.served_model_name = "my model";
  EXPECT_EQ(PlanServing(options_)->served_name, "my model");
}

TEST_F(ServingPlanTest, ServesNoNameThatNoRequestMaySay) {
  const std::string longest(128, 'n');
  options_.served_model_name = longest;
  EXPECT_EQ(PlanServing(options_)->served_name, longest);
  for (const std::string& name : {longest + "n", std::string("\xc3\xbc"), std::string("a\nb"),
                                  std::string("a\x7f"), std::string("\x01")}) {
    options_.served_model_name = name;
    EXPECT_THAT(Error(), AllOf(HasSubstr("--served-model-name '"), HasSubstr("128 bytes")));
  }
  options_.served_model_name.clear();
  options_.model = std::filesystem::path(directory_).replace_filename("\xc3\xbc");
  std::filesystem::rename(directory_, options_.model);
  EXPECT_THAT(Error(), AllOf(HasSubstr("--model"), HasSubstr("'\xc3\xbc'"),
                             HasSubstr("--served-model-name gives another")));
  options_.served_model_name = "u";
  EXPECT_EQ(PlanServing(options_)->served_name, "u");
}

TEST_F(ServingPlanTest, ImpossibleStartsAreOneLineThatNamesTheCause) {
  options_.model = "/nonexistent";
  EXPECT_THAT(Error(), AllOf(HasSubstr("--model"), HasSubstr("/nonexistent")));
  options_.model = std::filesystem::path(directory_).parent_path();
  EXPECT_THAT(Error(), HasSubstr("config.json"));
  options_.model = directory_;
  options_.tensor_parallel_size = 3;
  EXPECT_THAT(Error(),
              AllOf(HasSubstr("--tensor-parallel-size 3"), HasSubstr("2"), HasSubstr("4")));
  options_.tensor_parallel_size = 1;
  options_.max_model_len = 2048;
  EXPECT_THAT(Error(), AllOf(HasSubstr("--max-model-len 2048"), HasSubstr("1024")));
  options_.max_model_len = 512;
  options_.num_kv_blocks = 10;
  EXPECT_THAT(Error(), AllOf(HasSubstr("--num-kv-blocks 10"), HasSubstr("32")));
  options_.max_model_len = 0;
  EXPECT_EQ(PlanServing(options_)->scheduler.max_model_len, 160u);
  options_.quantization = "fp8";
  EXPECT_THAT(Error(), HasSubstr("--quantization"));
  options_.quantization.clear();
  WriteConfig("{\"architectures\": [\"MadeUpForCausalLM\"], \"model_type\": \"made_up\"}");
  EXPECT_THAT(Error(), HasSubstr("MadeUpForCausalLM"));
  WriteConfig("{");
  EXPECT_THAT(Error(), HasSubstr("config.json"));
}

TEST_F(ServingPlanTest, AmpleMemoryGivesWhatTheSequencesCanUse) {
  const absl::StatusOr<GroupSizes> sizes = Sizes({{"h", "", 16 * kGiB, 16 * kGiB}});
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_EQ(sizes->max_num_seqs, 64u);
  EXPECT_EQ(sizes->num_kv_blocks, 64u * 64u);  // 64 sequences of 1024 tokens
}

TEST_F(ServingPlanTest, FlagsDecide) {
  options_.max_num_seqs = 7;
  options_.num_kv_blocks = 100;
  const absl::StatusOr<GroupSizes> sizes = Sizes({{"h", "", 16 * kGiB, 16 * kGiB}});
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_EQ(sizes->max_num_seqs, 7u);
  EXPECT_EQ(sizes->num_kv_blocks, 100u);
}

TEST_F(ServingPlanTest, LittleMemoryGivesFewerSequencesAndBlocks) {
  const absl::StatusOr<ServingPlan> plan = PlanServing(options_);
  const RankMemory& memory = plan->predicted[0];
  // Room for the weights, and KV of three sequences of a quarter of the length.
  ServingShape shape = plan->shape;
  shape.max_num_seqs = 4;
  const RankMemory small = *PredictRankMemory(plan->model, shape, 1, 0, BackendKind::kCpu);
  const double needed =
      static_cast<double>(small.weight_bytes + small.activation_bytes + small.communication_bytes) +
      1.5 * 1024 * static_cast<double>(memory.kv_bytes_per_token);
  const auto free = static_cast<uint64_t>(needed / 0.6);
  const absl::StatusOr<GroupSizes> sizes = Sizes({{"h", "", free, free}});
  ASSERT_TRUE(sizes.ok()) << sizes.status();
  EXPECT_GE(sizes->max_num_seqs, 4u);
  EXPECT_LT(sizes->max_num_seqs, 64u);
  EXPECT_GE(sizes->num_kv_blocks, 64u);
  EXPECT_LE(sizes->num_kv_blocks, 96u);
}

TEST_F(ServingPlanTest, TooLittleMemoryIsAnErrorWithAdvice) {
  const absl::StatusOr<GroupSizes> sizes = Sizes({{"h", "", 1 << 10, 1 << 10}});
  ASSERT_FALSE(sizes.ok());
  EXPECT_THAT(std::string(sizes.status().message()), HasSubstr("--"));
}

TEST_F(ServingPlanTest, RanksOfOneHostShareItsMemoryAndTheSmallestDecides) {
  options_.tensor_parallel_size = 2;
  options_.max_num_batched_tokens = 64;  // small activations
  const auto blocks = [this](const std::vector<WorkerMemory>& workers) {
    const absl::StatusOr<GroupSizes> sizes = Sizes(workers);
    EXPECT_TRUE(sizes.ok()) << sizes.status();
    return sizes.ok() ? sizes->num_kv_blocks : 0;
  };
  const uint64_t some = 24 << 20;
  const uint32_t apart = blocks({{"a", "", some, some}, {"b", "", some, some}});
  const uint32_t together = blocks({{"a", "", some, some}, {"a", "", some, some}});
  const uint32_t uneven = blocks({{"a", "", kGiB, kGiB}, {"b", "", some, some}});
  const uint32_t uneven_the_other_way = blocks({{"a", "", some, some}, {"b", "", kGiB, kGiB}});
  EXPECT_LT(together, apart);
  EXPECT_EQ(uneven, apart);
  EXPECT_EQ(uneven_the_other_way, apart);
}

TEST_F(ServingPlanTest, ConfigureCarriesThePlan) {
  options_.tensor_parallel_size = 2;
  options_.dtype = "bfloat16";
  options_.load_format = "dummy";  // the digest needs no weights then
  const GroupOptions group = MakeGroupOptions(*PlanServing(options_), options_);
  EXPECT_EQ(group.tp_size, 2u);
  EXPECT_EQ(group.configure.dtype(), "bfloat16");
  EXPECT_EQ(group.configure.max_model_len(), 1024u);
  EXPECT_NE(group.configure.model_digest(), 0u);
  EXPECT_TRUE(std::filesystem::path(group.configure.model_path()).is_absolute());
}

TEST_F(ServingPlanTest, KeysAndValuesOfOneByteGiveTwiceTheBlocks) {
  options_.backend = "cuda";
  options_.dtype = "bfloat16";
  options_.max_num_batched_tokens = 64;
  const std::vector<WorkerMemory> workers = {{"h", "", 3 * kGiB, 3 * kGiB}};
  const absl::StatusOr<GroupSizes> sixteen = Sizes(workers);
  ASSERT_TRUE(sixteen.ok()) << sixteen.status();
  EXPECT_EQ(MakeGroupOptions(*PlanServing(options_), options_).configure.kv_dtype(), "");
  for (const char* fp8 : {"fp8", "fp8_e4m3"}) {
    options_.kv_cache_dtype = fp8;
    const absl::StatusOr<GroupSizes> eight = Sizes(workers);
    ASSERT_TRUE(eight.ok()) << eight.status();
    EXPECT_NEAR(eight->num_kv_blocks, 2.0 * sixteen->num_kv_blocks, 0.01 * sixteen->num_kv_blocks);
    const ServingPlan plan = *PlanServing(options_);
    EXPECT_EQ(MakeGroupOptions(plan, options_).configure.kv_dtype(), "float8_e4m3fn");
    EXPECT_EQ(PredictGroup(plan, {.num_kv_blocks = 10, .max_num_seqs = 4})[0].kv,
              10u * 16 * 2 * 2 * 4 * 8);  // tokens, k and v, layers, KV heads, head_dim
  }
}

TEST_F(ServingPlanTest, KeysAndValuesOfOneByteAreRefusedWhereNobodyKeepsThem) {
  options_.kv_cache_dtype = "fp8";
  EXPECT_THAT(Error(), AllOf(HasSubstr("--kv-cache-dtype fp8"), HasSubstr("--backend cuda")));
  options_.backend = "cuda";  // the model is of float32
  EXPECT_THAT(Error(), AllOf(HasSubstr("--kv-cache-dtype fp8"), HasSubstr("--dtype bfloat16")));
  options_.dtype = "bfloat16";
  EXPECT_TRUE(PlanServing(options_).ok());
}

TEST_F(ServingPlanTest, WeightsOfOneByteGoWithNoFloat32) {
  options_.backend = "cuda";
  options_.quantization = "fp8";
  EXPECT_THAT(Error(), AllOf(HasSubstr("--dtype auto: float32"), HasSubstr("--dtype bfloat16")));
}

TEST_F(ServingPlanTest, MemoryIsPredictedForTheSizesThatTheGroupHas) {
  options_.tensor_parallel_size = 2;
  const ServingPlan plan = *PlanServing(options_);
  const std::vector<MemoryParts> ranks =
      MakeGroupOptions(plan, options_).predict({.num_kv_blocks = 100, .max_num_seqs = 4});
  ASSERT_EQ(ranks.size(), 2u);
  const RankMemory& memory = plan.predicted[1];
  EXPECT_EQ(ranks[1].weights, static_cast<uint64_t>(memory.weight_bytes));
  EXPECT_EQ(ranks[1].kv, static_cast<uint64_t>(100 * 16 * memory.kv_bytes_per_token));
  EXPECT_EQ(ranks[1].activations, static_cast<uint64_t>(memory.activation_bytes));
  EXPECT_EQ(ranks[1].communication, static_cast<uint64_t>(memory.communication_bytes));
  EXPECT_EQ(ranks[1].total(), ranks[1].kv + static_cast<uint64_t>(memory.fixed_bytes()));
}

}  // namespace
}  // namespace lockstep
