// The demo model through the real programs: the tokens transformers computed,
// at every split, alone and together, in one chunk and in many, preempted or not.
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;

const json& Expected() {
  static const json* expected = [] {
    std::ifstream file(std::string(LOCKSTEP_SOURCE_DIR) + "/deploy/demo/expected.json");
    return new json(json::parse(file));
  }();
  return *expected;
}

v1::GenerateRequest RequestFor(const json& expected_case) {
  v1::GenerateRequest request;
  for (const json& message : expected_case["messages"]) {
    v1::ChatMessage* out = request.mutable_chat()->add_messages();
    out->set_role(message["role"].get<std::string>());
    out->set_content(message["content"].get<std::string>());
  }
  request.mutable_sampling()->set_temperature(0);
  return request;
}

void ExpectCase(const json& expected_case, StreamedAnswer& answer) {
  SCOPED_TRACE(expected_case["prompt_text"].get<std::string>());
  ASSERT_TRUE(answer.Await().ok()) << answer.Await();
  EXPECT_EQ(answer.token_ids(), expected_case["greedy_token_ids"].get<std::vector<uint32_t>>());
  EXPECT_EQ(answer.text(), expected_case["text"].get<std::string>());
  EXPECT_EQ(answer.finishes(), 1);
}

// All cases at once.
void ExpectAllTogether(TestServer& served) {
  std::vector<std::unique_ptr<StreamedAnswer>> answers;
  for (const json& each : Expected()["cases"]) {
    answers.push_back(std::make_unique<StreamedAnswer>(&served.client(), RequestFor(each)));
  }
  for (size_t i = 0; i < answers.size(); ++i) ExpectCase(Expected()["cases"][i], *answers[i]);
}

TEST(DemoModelTest, HasVisiblyLearnedItsTask) {
  ASSERT_GE(Expected()["cases"].size(), 40u);
  for (const auto& [task, figures] : Expected()["accuracy"].items()) {
    EXPECT_GE(figures["right"].get<double>(), 0.95) << task;
  }
  auto served = TestServer::Start(DemoModel(), 1, {"--dtype", "float32"});
  ASSERT_NE(served, nullptr);
  int right = 0;
  for (const json& each : Expected()["cases"]) {
    StreamedAnswer answer(&served->client(), RequestFor(each));
    ASSERT_TRUE(answer.Await().ok());
    if (answer.text() == each["right_answer"].get<std::string>()) ++right;
  }
  EXPECT_GE(right, static_cast<int>(Expected()["cases"].size() * 95 / 100));
}

class ParityTest : public ::testing::TestWithParam<int> {};

TEST_P(ParityTest, TogetherAndAlone) {
  auto served = TestServer::Start(DemoModel(), GetParam(), {"--dtype", "float32"});
  ASSERT_NE(served, nullptr);
  ExpectAllTogether(*served);
  for (size_t i = 0; i < Expected()["cases"].size(); i += 7) {
    StreamedAnswer answer(&served->client(), RequestFor(Expected()["cases"][i]));
    ExpectCase(Expected()["cases"][i], answer);
  }
}

TEST_P(ParityTest, InSmallChunksAndPreempted) {
  auto served =
      TestServer::Start(DemoModel(), GetParam(),
                        {"--dtype", "float32", "--max-num-batched-tokens", "16", "--max-num-seqs",
                         "12", "--num-kv-blocks", "64", "--max-model-len", "512", "--block-size",
                         "8", "--max-queued-requests", "200"});
  ASSERT_NE(served, nullptr);
  ExpectAllTogether(*served);
  // Long answers together want more blocks than there are.
  std::vector<std::unique_ptr<StreamedAnswer>> answers;
  for (int i = 0; i < 12; ++i) {
    answers.push_back(std::make_unique<StreamedAnswer>(
        &served->client(), LongGreedy("Count from 1 to " + std::to_string(30 + i) + ".", 150)));
  }
  std::vector<std::vector<uint32_t>> together;
  for (auto& answer : answers) {
    ASSERT_TRUE(answer->Await().ok()) << answer->Await();
    together.push_back(answer->token_ids());
    EXPECT_EQ(together.back().size(), 150u);
  }
  EXPECT_GT(served->Metric("vllm:num_preemptions_total{engine=\"0\",model_name=\"model\"}"), 0)
      << HttpRequest(served->server().http_port(), "GET", "/metrics");
  for (int i = 0; i < 12; i += 5) {
    StreamedAnswer alone(&served->client(),
                         LongGreedy("Count from 1 to " + std::to_string(30 + i) + ".", 150));
    ASSERT_TRUE(alone.Await().ok());
    EXPECT_EQ(alone.token_ids(), together[static_cast<size_t>(i)]);
  }
}

INSTANTIATE_TEST_SUITE_P(TpSizes, ParityTest, ::testing::Values(1, 2, 4));

v1::GenerateRequest Seeded(const std::string& prompt, int64_t seed) {
  v1::GenerateRequest request = LongGreedy(prompt, 40);
  request.mutable_sampling()->set_temperature(1.5);
  request.mutable_sampling()->set_top_p(0.95F);
  request.mutable_sampling()->set_frequency_penalty(0.5F);
  request.mutable_sampling()->set_seed(seed);
  return request;
}

TEST(SeedTest, ResultDependsNeitherOnBatchMatesNorOnTheSplit) {
  std::vector<std::vector<uint32_t>> reference;
  for (int tp : {1, 2, 4}) {
    auto served = TestServer::Start(DemoModel(), tp, {"--dtype", "float32"});
    ASSERT_NE(served, nullptr);
    std::vector<std::unique_ptr<StreamedAnswer>> mates;
    for (int i = 0; i < 8; ++i) {
      mates.push_back(
          std::make_unique<StreamedAnswer>(&served->client(), Seeded("Tell me a story.", i)));
    }
    std::vector<std::vector<uint32_t>> together;
    for (auto& mate : mates) {
      ASSERT_TRUE(mate->Await().ok()) << mate->Await();
      together.push_back(mate->token_ids());
    }
    if (reference.empty()) reference = together;
    EXPECT_EQ(together, reference) << "tp " << tp;
    StreamedAnswer alone(&served->client(), Seeded("Tell me a story.", 3));
    ASSERT_TRUE(alone.Await().ok());
    EXPECT_EQ(alone.token_ids(), reference[3]) << "tp " << tp;
  }
  EXPECT_NE(reference[0], reference[1]);
}

}  // namespace
}  // namespace lockstep
