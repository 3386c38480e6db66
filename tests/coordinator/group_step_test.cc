// How long a step may take, and when it is done.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "coordinator/group/step_deadline.h"
#include "coordinator/group/step_ledger.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(StepDeadlineTest, FirstStepsAreAllowedByTheirWork) {
  StepDeadlineOptions options;
  options.first_step_ms = 5'000;
  options.first_step_ms_per_token = 10;
  const StepDeadline deadline(options);
  EXPECT_EQ(deadline.AllowanceMs(1), 5'010);
  EXPECT_EQ(deadline.AllowanceMs(2'048), 25'480);
}

TEST(StepDeadlineTest, NeverBelowTheFloor) {
  StepDeadline deadline({});
  for (int i = 0; i < 100; ++i) deadline.Observe(1, 1.0);
  EXPECT_EQ(deadline.AllowanceMs(1), 3'000);
}

TEST(StepDeadlineTest, AMultipleOfWhatSuchStepsTook) {
  StepDeadline deadline({});
  deadline.Observe(4, 1'000);
  EXPECT_EQ(deadline.AllowanceMs(4), 20'000);
  EXPECT_EQ(deadline.AllowanceMs(7), 20'000);  // 4 to 7 tokens are one kind
}

TEST(StepDeadlineTest, LargerStepsAreScaledFromSmallerOnes) {
  StepDeadline deadline({});
  deadline.Observe(1, 500);
  EXPECT_EQ(deadline.AllowanceMs(1), 10'000);
  EXPECT_EQ(deadline.AllowanceMs(512), 512 * 10'000);
}

TEST(StepDeadlineTest, SmallerStepsAreBoundedByLargerOnes) {
  StepDeadline deadline({});
  deadline.Observe(512, 2'000);
  EXPECT_EQ(deadline.AllowanceMs(1), 40'000);
}

TEST(StepDeadlineTest, ASlowStepIsRememberedAndInTheEndForgotten) {
  StepDeadline deadline({});
  deadline.Observe(1, 10'000);
  for (int i = 0; i < 50; ++i) deadline.Observe(1, 10);
  EXPECT_GT(deadline.AllowanceMs(1), 150'000);
  for (int i = 0; i < 5'000; ++i) deadline.Observe(1, 10);
  EXPECT_EQ(deadline.AllowanceMs(1), 3'000);
}

TEST(StepDeadlineTest, WildMeasurementsAreBounded) {
  StepDeadline deadline({});
  deadline.Observe(1, 1e30);
  EXPECT_EQ(deadline.AllowanceMs(~uint64_t{0}), 86'400'000);
}

StepPlan Plan(uint64_t step, uint32_t tokens) {
  StepPlan plan;
  plan.step = step;
  plan.digest = step * 11;
  plan.spans = {{Slot(0), tokens}, {Slot(1), 1}};
  return plan;
}
StepResult Result(uint64_t step, uint32_t collectives = 3) {
  StepResult result;
  result.step = step;
  result.digest = step * 11;
  result.num_collectives = collectives;
  result.timing.total_ns = step;
  return result;
}

TEST(StepLedgerTest, ResultIsRankZerosAndTimingsAreEverybodys) {
  StepLedger ledger(2);
  ledger.Sent(Plan(1, 5), 100);
  StepResult zero = Result(1);
  zero.sampled.emplace_back().token = 42;
  StepResult one = Result(1);
  one.timing.total_ns = 9;
  ASSERT_FALSE((*ledger.Answer(1, one, 110)).has_value());
  EXPECT_THAT(ledger.Missing(), ElementsAre(0));
  const auto done = ledger.Answer(0, zero, 125);
  ASSERT_TRUE(done.ok() && done->has_value());
  EXPECT_EQ((*done)->step.result.sampled[0].token, 42u);
  EXPECT_EQ((*done)->step.timings[0].total_ns, 1u);
  EXPECT_EQ((*done)->step.timings[1].total_ns, 9u);
  EXPECT_EQ((*done)->tokens, 6u);
  EXPECT_EQ((*done)->milliseconds, 25);
  EXPECT_EQ(ledger.oldest(), nullptr);
}

TEST(StepLedgerTest, StepsQueuedBehindOthersAreTimedFromTheirEnd) {
  StepLedger ledger(1);
  ledger.Sent(Plan(1, 1), 100);
  ledger.Sent(Plan(2, 1), 101);
  EXPECT_EQ((**ledger.Answer(0, Result(1), 150)).milliseconds, 50);
  EXPECT_EQ((**ledger.Answer(0, Result(2), 160)).milliseconds, 10);
}

TEST(StepLedgerTest, AStepQueuedBehindAnotherIsForgivenToo) {
  StepLedger ledger(1);
  ledger.Sent(Plan(1, 1), 100);
  ledger.Sent(Plan(2, 1), 110);
  ledger.Forgive(5'000);  // of which both had something
  EXPECT_EQ((**ledger.Answer(0, Result(1), 5'105)).milliseconds, 5);
  ASSERT_NE(ledger.oldest(), nullptr);
  EXPECT_EQ(ledger.oldest()->began_ms, 5'110);
}

TEST(StepLedgerTest, ContradictionsAreErrorsThatSayWhich) {
  StepLedger ledger(2);
  EXPECT_THAT(std::string(ledger.Answer(0, Result(1), 0).status().message()),
              HasSubstr("not sent"));
  ledger.Sent(Plan(1, 1), 0);
  StepResult wrong = Result(1);
  wrong.digest = 1;
  EXPECT_THAT(std::string(ledger.Answer(0, wrong, 0).status().message()), HasSubstr("digest"));
  ASSERT_TRUE(ledger.Answer(0, Result(1), 0).ok());
  EXPECT_THAT(std::string(ledger.Answer(0, Result(1), 0).status().message()),
              HasSubstr("already answered"));
  EXPECT_THAT(std::string(ledger.Answer(1, Result(1, 4), 0).status().message()),
              HasSubstr("ran 4 collectives in step 1 where rank 0 ran 3"));
}

}  // namespace
}  // namespace lockstep
