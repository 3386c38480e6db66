// Prompts of hundreds and thousands of tokens, split over ranks: the next tokens are those of
// one rank. On GPUs the ranks deal such steps' rows out, hundreds by one kernel
// (kernels/row_reduce.h) and thousands in two halves (worker/backend/cuda/backend_halves.cc),
// which shorter prompts never see. And answers to a long prompt that are decoded together are those
// that are decoded alone: on GPUs attention of many long rows is dealt out by a plan
// (kernels/attention_decode.h).
//
// Dummy weights in the shapes of tests/golden. By default one family, whose chain of norms is the
// longest, over two ranks; LOCKSTEP_GOLDEN_MODELS=all: every one, over four too.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/close_tokens.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

constexpr int kContext = 4'096;
constexpr uint32_t kLengths[] = {300, 1'100, 1'600, 3'001};

std::vector<std::string> Families() {
  const char* const asked = std::getenv("LOCKSTEP_GOLDEN_MODELS");
  if (asked == nullptr) return {"gemma3"};
  if (std::string(asked) != "all") return {asked};
  return {"gemma3", "llama", "mistral_window", "opt_post_norm_projected", "opt", "qwen2", "qwen3"};
}

// The model's folder but for its weights, with room for long prompts and rows of `hidden`
// elements (0: as it is).
class LongModel {
 public:
  explicit LongModel(const std::string& name, int hidden = 0)
      : path_(std::filesystem::path(::testing::TempDir()) /
              absl::StrCat("long-", name, "-", ::getpid())) {
    std::filesystem::create_directories(path_);
    for (const char* file : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
      const std::filesystem::path from = std::filesystem::path(GoldenModel(name)) / file;
      if (std::filesystem::exists(from)) std::filesystem::copy(from, path_ / file);
    }
    std::ifstream in(GoldenModel(name) + "/config.json");
    nlohmann::json config = nlohmann::json::parse(in);
    config["max_position_embeddings"] = kContext;
    if (hidden != 0) {
      config["head_dim"] = 8;
      config["hidden_size"] = hidden;
    }
    vocab_size_ = config.at("vocab_size").get<uint32_t>();
    std::ofstream(path_ / "config.json") << config;
  }
  ~LongModel() { std::filesystem::remove_all(path_); }
  LongModel(const LongModel&) = delete;
  LongModel& operator=(const LongModel&) = delete;

  std::string path() const { return path_; }
  uint32_t vocab_size() const { return vocab_size_; }

 private:
  const std::filesystem::path path_;
  uint32_t vocab_size_ = 0;
};

v1::GenerateRequest Greedy(const LongModel& model, uint32_t length, uint32_t max_tokens) {
  v1::GenerateRequest request;
  for (uint32_t i = 0; i < length; ++i) {
    request.mutable_token_ids()->add_ids((i * i * 31 + i * 7 + length) % model.vocab_size());
  }
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_ignore_eos(true);
  request.mutable_sampling()->set_logprobs(5);
  return request;
}

std::unique_ptr<TestServer> Serve(const LongModel& model, int tp_size,
                                  const std::vector<std::string>& flags) {
  std::vector<std::string> all = {"--load-format",
                                  "dummy",
                                  "--max-model-len",
                                  absl::StrCat(kContext),
                                  "--max-num-batched-tokens",
                                  absl::StrCat(kContext),
                                  "--no-enable-prefix-caching"};
  all.insert(all.end(), flags.begin(), flags.end());
  return TestServer::Start(model.path(), tp_size, all);
}

// The likeliest first tokens of answers to a prompt of each length.
std::vector<v1::TokenLogprobs> FirstTokens(const LongModel& model, int tp_size,
                                           const std::vector<std::string>& flags) {
  std::vector<v1::TokenLogprobs> tokens;
  const auto served = Serve(model, tp_size, flags);
  if (served == nullptr) return tokens;
  for (const uint32_t length : kLengths) {
    const absl::StatusOr<v1::GenerateResponse> answer =
        served->client().Generate(Greedy(model, length, 1));
    EXPECT_TRUE(answer.ok()) << answer.status() << served->server().Log();
    if (!answer.ok()) return tokens;
    EXPECT_EQ(answer->completions(0).logprobs_size(), 1);
    tokens.push_back(answer->completions(0).logprobs(0));
  }
  return tokens;
}

void ExpectTheSameSplit(const std::string& family, int tp_size,
                        const std::vector<std::string>& flags, double bound, int hidden = 0) {
  SCOPED_TRACE(family);
  const LongModel model(family, hidden);
  const std::vector<v1::TokenLogprobs> wanted = FirstTokens(model, 1, flags);
  const std::vector<v1::TokenLogprobs> got = FirstTokens(model, tp_size, flags);
  ASSERT_EQ(wanted.size(), std::size(kLengths));
  ASSERT_EQ(got.size(), wanted.size());
  const Closeness closeness = ExpectCloseTokens(wanted, got, bound);
  EXPECT_GT(closeness.least_common, 0);
  std::printf("%s: log-probabilities within %g\n", family.c_str(), closeness.worst);
}

class LongSplitTest : public ::testing::TestWithParam<int> {};

TEST_P(LongSplitTest, Float32IsTheSame) {
  for (const std::string& family : Families()) {
    ExpectTheSameSplit(family, GetParam(), {"--dtype", "float32"}, 2e-3);
  }
}

TEST_P(LongSplitTest, BFloat16IsClose) {
  for (const std::string& family : Families()) {
    ExpectTheSameSplit(family, GetParam(), {"--dtype", "bfloat16"}, 0.5);
  }
}

// On GPUs rows so wide are dealt out by several launches, of a number of rows that the ranks do
// not divide: 819 of 5,120 elements.
TEST_P(LongSplitTest, WideRowsAreClose) {
  if (!OnGpus()) GTEST_SKIP() << "the cpu backend deals no rows out";
  ExpectTheSameSplit("llama", GetParam(), {"--dtype", "bfloat16"}, 0.5, /*hidden=*/5'120);
}

// e4m3 rounds to three bits what differs in the last of sixteen.
TEST_P(LongSplitTest, Fp8IsClose) {
  if (!OnGpus()) GTEST_SKIP() << "the cpu backend has no FP8";
  ExpectTheSameSplit("qwen3", GetParam(), {"--dtype", "bfloat16", "--quantization", "fp8"}, 0.5);
}

INSTANTIATE_TEST_SUITE_P(TpSizes, LongSplitTest, ::testing::ValuesIn(SplitSizes()), SplitName);

class LongAnswersTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Whole, LongAnswersTest, ::testing::Values(1), SplitName);
INSTANTIATE_TEST_SUITE_P(TpSizes, LongAnswersTest, ::testing::ValuesIn(SplitSizes()), SplitName);

TEST_P(LongAnswersTest, DecodedTogetherAreCloseToOneAlone) {
  constexpr uint32_t kAnswers = 16, kTokens = 8;
  const LongModel model("qwen3");  // of 4 KV heads
  const auto served = Serve(model, GetParam(), {"--dtype", "bfloat16"});
  ASSERT_NE(served, nullptr);
  v1::GenerateRequest request = Greedy(model, 2'500, kTokens);
  const absl::StatusOr<v1::GenerateResponse> alone = served->client().Generate(request);
  ASSERT_TRUE(alone.ok()) << alone.status() << served->server().Log();
  request.mutable_sampling()->set_n(kAnswers);
  const absl::StatusOr<v1::GenerateResponse> together = served->client().Generate(request);
  ASSERT_TRUE(together.ok()) << together.status() << served->server().Log();
  ASSERT_EQ(together->completions_size(), static_cast<int>(kAnswers));
  const v1::Completion& wanted = alone->completions(0);
  ASSERT_EQ(wanted.logprobs_size(), static_cast<int>(kTokens));
  size_t behind_the_first = 0;  // that is of the prompt's own step
  for (const v1::Completion& got : together->completions()) {
    ASSERT_EQ(got.logprobs_size(), static_cast<int>(kTokens));
    const std::vector<v1::TokenLogprobs> common = UpToDifference(wanted, got);
    ExpectCloseTokens(common, UpToDifference(got, wanted), 0.5);
    behind_the_first += common.size() - 1;
  }
  EXPECT_GT(behind_the_first, 0u);
}

}  // namespace
}  // namespace lockstep
