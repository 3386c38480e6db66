// What an answer lists of its prompts is bounded, in one request and in all of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "coordinator/api/limits.h"
#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class PromptLogprobsTest : public ApiFixture {
 protected:
  static constexpr uint64_t kTokens = limits::kPromptLogprobs / 64 / 21;  // 64 prompts fit

  void SetUp() override {
    model_.max_model_len = 1024;
    engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
    Open();
  }
  static json Body(uint64_t prompts) {
    return {{"prompt", json::array_t(prompts, json::array_t(kTokens, 5))},
            {"prompt_logprobs", 20},
            {"max_tokens", 2}};
  }
};

TEST_F(PromptLogprobsTest, OneRequestListsSoManyAndNoMore) {
  EXPECT_EQ(Complete(Body(64)).status, 200);
  const RawResponse refused = Complete(Body(65));
  EXPECT_EQ(refused.status, 400);
  EXPECT_THAT(std::string(refused.error()["message"]), HasSubstr("allowed: 1048576"));
  json many = Body(33);
  many["n"] = 2;
  EXPECT_EQ(Complete(many).status, 400);
  json none = Body(65);
  none.erase("prompt_logprobs");
  EXPECT_EQ(Complete(none).status, 200);
}

TEST_F(PromptLogprobsTest, AllRequestsTogetherHaveTwiceThat) {
  engine_.Hold();
  std::thread first([this] { EXPECT_EQ(Complete(Body(64)).status, 200); });
  std::thread second([this] { EXPECT_EQ(Complete(Body(64)).status, 200); });
  EXPECT_TRUE(engine_.WaitSubmitted(128));
  const RawResponse refused = Complete(Body(3));
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
  engine_.Release();
  first.join();
  second.join();
  // The places are given back behind the answers' last bytes.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  int status = 0;
  while (status != 200 && std::chrono::steady_clock::now() < deadline) {
    status = Complete(Body(64)).status;
  }
  EXPECT_EQ(status, 200);
}

}  // namespace
}  // namespace lockstep
