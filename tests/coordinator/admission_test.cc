#include "coordinator/admission.h"

#include <string>

#include "coordinator/retry_delay.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/request_builder.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

SchedulerConfig Config() {
  SchedulerConfig config;
  config.max_model_len = 100;
  config.block_size = 16;
  config.num_kv_blocks = 5;  // 80 positions
  config.max_queued_requests = 2;
  return config;
}

class AdmissionTest : public testing::Test {
 protected:
  absl::Status Check(const RequestBuilder& builder, uint32_t waiting = 0, uint32_t idle = 0) {
    return admission_.Check(builder.Build(), waiting, idle);
  }
  std::string Message(const RequestBuilder& builder) {
    const absl::Status status = Check(builder);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  }

  Admission admission_{Config()};
};

TEST_F(AdmissionTest, RefusesWhatExceedsTheModelsLengthWithTheNumbers) {
  EXPECT_THAT(
      Message(RequestBuilder(1).Prompt(60).MaxTokens(41)),
      AllOf(HasSubstr("max_tokens"), HasSubstr("101"), HasSubstr("100"), HasSubstr("at most 40")));
}

TEST_F(AdmissionTest, RefusesAPromptThatFillsTheModelsLength) {
  EXPECT_THAT(Message(RequestBuilder(1).Prompt(100).MaxTokens(0)), HasSubstr("prompt: 100 tokens"));
}

TEST_F(AdmissionTest, RefusesAnEmptyPrompt) {
  EXPECT_THAT(Message(RequestBuilder(1).Prompt(0)), HasSubstr("prompt"));
}

TEST_F(AdmissionTest, DoesNotOverflowOnTheLargestMaxTokens) {
  EXPECT_THAT(Message(RequestBuilder(1).Prompt(4).MaxTokens(0xffffffff)), HasSubstr("4294967299"));
}

TEST_F(AdmissionTest, RefusesWhatNeedsMoreBlocksThanThereAre) {
  EXPECT_THAT(Message(RequestBuilder(1).Prompt(60).MaxTokens(22)),
              AllOf(HasSubstr("6 KV blocks"), HasSubstr("has 5")));
}

TEST_F(AdmissionTest, AcceptsWhatFitsToTheLastPosition) {
  // The last of 81 tokens needs no KV.
  EXPECT_EQ(Check(RequestBuilder(1).Prompt(60).MaxTokens(21)), absl::OkStatus());
}

TEST_F(AdmissionTest, RefusesWhenTheQueueIsFullAndSaysWhenToRetry) {
  EXPECT_EQ(Check(RequestBuilder(1), 1), absl::OkStatus());
  const absl::Status full = Check(RequestBuilder(1), 2);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(GetRetryDelay(full).value(), 1);
}

TEST_F(AdmissionTest, CountsOnlyTheQueueBeyondIdleSlots) {
  EXPECT_EQ(Check(RequestBuilder(1), 4, /*idle=*/3), absl::OkStatus());
  EXPECT_EQ(Check(RequestBuilder(1), 5, /*idle=*/3).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(AdmissionTest, WhatCanNeverFitIsInvalidEvenWhenTheQueueIsFull) {
  EXPECT_EQ(Check(RequestBuilder(1).Prompt(200), 9).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(AdmissionTest, TheRetryDelayFollowsThePaceOfTheQueue) {
  int64_t now_ms = 0;
  for (int i = 0; i < 100; ++i) admission_.NoteStarted(now_ms += 4'000, /*still_waiting=*/10);
  EXPECT_EQ(admission_.RetryDelaySeconds(10), 20);
  for (int i = 0; i < 100; ++i) admission_.NoteStarted(now_ms += 10, /*still_waiting=*/10);
  EXPECT_EQ(admission_.RetryDelaySeconds(10), 1);
}

TEST_F(AdmissionTest, IdleTimeDoesNotCountAsASlowQueue) {
  int64_t now_ms = 0;
  for (int i = 0; i < 100; ++i) admission_.NoteStarted(now_ms += 100, /*still_waiting=*/5);
  admission_.NoteStarted(now_ms += 100, /*still_waiting=*/0);
  admission_.NoteStarted(now_ms += 3'600'000, /*still_waiting=*/5);
  EXPECT_EQ(admission_.RetryDelaySeconds(10), 1);
}

TEST_F(AdmissionTest, AQueueThatEmptiesWithoutAStartIsIdleToo) {
  int64_t now_ms = 0;
  for (int i = 0; i < 100; ++i) admission_.NoteStarted(now_ms += 100, /*still_waiting=*/5);
  admission_.NoteIdle();
  admission_.NoteStarted(now_ms += 3'600'000, /*still_waiting=*/5);
  EXPECT_EQ(admission_.RetryDelaySeconds(10), 1);
}

TEST(RetryDelayTest, TravelsInsideTheStatus) {
  absl::Status status = absl::ResourceExhaustedError("full");
  EXPECT_EQ(GetRetryDelay(status), std::nullopt);
  SetRetryDelay(&status, 17);
  EXPECT_EQ(GetRetryDelay(status), 17);
}

TEST(RetryDelayTest, IgnoresAPayloadThatIsNotANumber) {
  absl::Status status = absl::ResourceExhaustedError("full");
  status.SetPayload(kRetryDelayTypeUrl, absl::Cord("soon"));
  EXPECT_EQ(GetRetryDelay(status), std::nullopt);
}

}  // namespace
}  // namespace lockstep
