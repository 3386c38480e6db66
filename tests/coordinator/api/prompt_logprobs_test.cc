// What an answer lists of its prompts is bounded, in one request and in all of them.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>

#include "coordinator/api/limits.h"
#include "proto/inference.grpc.pb.h"
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

// Of those that fit nobody waits for the answer: a million entries take long.
TEST_F(PromptLogprobsTest, OneRequestListsSoManyAndNoMore) {
  engine_.Hold();
  RawClient most(http());
  most.Send(PostBytes("/v1/completions", Body(64).dump()));
  EXPECT_TRUE(engine_.WaitSubmitted(64));
  const RawResponse refused = Complete(Body(65));
  EXPECT_EQ(refused.status, 400);
  EXPECT_THAT(std::string(refused.error()["message"]), HasSubstr("allowed: 1048576"));
  json many = Body(33);
  many["n"] = 2;
  EXPECT_EQ(Complete(many).status, 400);
  json none = Body(65);
  none.erase("prompt_logprobs");
  RawClient unlisted(http());
  unlisted.Send(PostBytes("/v1/completions", none.dump()));
  EXPECT_TRUE(engine_.WaitSubmitted(64 + 65));
}

TEST_F(PromptLogprobsTest, TheGrpcDoorHasTheSameLimit) {
  model_.max_model_len = 1 << 16;
  Open();
  const auto stub = v1::Inference::NewStub(grpc::CreateChannel(
      "127.0.0.1:" + std::to_string(server_->grpc_port()), grpc::InsecureChannelCredentials()));
  v1::GenerateRequest request;
  for (uint64_t i = 0; i <= limits::kPromptLogprobs / 21; ++i)
    request.mutable_token_ids()->add_ids(5);
  request.mutable_sampling()->set_prompt_logprobs(20);
  request.mutable_sampling()->set_max_tokens(1);
  v1::GenerateResponse response;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  const grpc::Status refused = stub->Generate(&context, request, &response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("allowed: 1048576"));

  // This door lists a prompt once, however many choices there are.
  request.mutable_token_ids()->clear_ids();
  for (int i = 0; i < 3'300; ++i) request.mutable_token_ids()->add_ids(5);
  request.mutable_sampling()->set_n(16);
  request.mutable_sampling()->set_temperature(1);
  grpc::ClientContext again;
  again.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  const grpc::Status taken = stub->Generate(&again, request, &response);
  EXPECT_TRUE(taken.ok()) << taken.error_message();
  EXPECT_EQ(response.prompt().prompt_logprobs_size(), 3'300);
}

TEST_F(PromptLogprobsTest, AllRequestsTogetherHaveTwiceThat) {
  engine_.Hold();
  {
    RawClient first(http()), second(http());
    first.Send(PostBytes("/v1/completions", Body(64).dump()));
    second.Send(PostBytes("/v1/completions", Body(64).dump()));
    ASSERT_TRUE(engine_.WaitSubmitted(128));
    const RawResponse refused = Complete(Body(3));
    EXPECT_EQ(refused.status, 429);
    EXPECT_EQ(refused.headers.at("retry-after"), "1");
  }
  ASSERT_TRUE(engine_.WaitCancelled(128));
  engine_.Release();
  // The places are given back as the server lets go of who left.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  int status = 0;
  while (status != 200 && std::chrono::steady_clock::now() < deadline) {
    status = Complete(Body(3)).status;
  }
  EXPECT_EQ(status, 200);
}

}  // namespace
}  // namespace lockstep
