// The delay after which refused clients may ask again: it tells how fast the queue
// moves, and no time in which nobody waited or nobody was served.
#include <functional>
#include <memory>
#include <utility>

#include "coordinator/retry_delay.h"
#include "coordinator/scheduler.h"
#include "gtest/gtest.h"
#include "tests/fakes/scheduler_harness.h"

namespace lockstep {
namespace {

constexpr int64_t kHourMs = 3'600'000;

class PaceTest : public testing::Test {
 protected:
  void Reset(const SchedulerConfig& config) {
    h_ = std::make_unique<SchedulerHarness>(config);
    next_ = 1;
  }
  // Adds requests until one is refused; returns that refusal's delay.
  int Fill(int64_t deadline_ms = kNoDeadline) {
    for (;;) {
      const absl::Status added =
          h_->Add(RequestBuilder(next_++).MaxTokens(4).Deadline(deadline_ms));
      if (!added.ok()) return GetRetryDelay(added).value();
    }
  }
  void CancelAll() {
    for (uint64_t id = 1; id < next_; ++id) h_->scheduler.Cancel(RequestId(id));
  }
  // Another burst, of which some start: the next client that is refused.
  int DelayOfABusyQueue() {
    Fill();
    h_->Step();
    return Fill();
  }

  std::unique_ptr<SchedulerHarness> h_;
  uint64_t next_ = 1;
};

TEST_F(PaceTest, NoIdleTimeSlowsTheDelay) {
  using Empty = std::function<void()>;
  const std::pair<const char*, Empty> ways[] = {
      {"cancel", [this] { CancelAll(); }},
      {"deadline",
       [this] {
         h_->now_ms += 1'000;
         EXPECT_FALSE(h_->Plan().has_value());
       }},
      {"failure", [this] { h_->scheduler.FailAll(absl::UnavailableError("gone"), &h_->events); }},
  };
  for (const auto& [name, empty] : ways) {
    Reset(SmallSchedulerConfig());
    Fill(/*deadline_ms=*/1'000);
    h_->Step();  // four start, eight wait
    ASSERT_EQ(h_->scheduler.Stats().waiting, 8u) << name;
    empty();
    ASSERT_FALSE(h_->scheduler.HasRequests()) << name;
    h_->now_ms += kHourMs;
    EXPECT_LE(DelayOfABusyQueue(), 3) << name;
  }
}

TEST_F(PaceTest, NoRecoverySlowsTheDelay) {
  Reset(SmallSchedulerConfig());
  Fill();
  h_->Step();
  h_->Die();
  h_->now_ms += kHourMs;
  h_->BeginEpoch(2);
  h_->RunAll();
  EXPECT_LE(DelayOfABusyQueue(), 3);
}

// The last who waited had run before: no start is counted when it comes back.
TEST_F(PaceTest, NoTimeAfterAPreemptedOneIsBackSlowsTheDelay) {
  SchedulerConfig config = SmallSchedulerConfig();
  config.num_kv_blocks = 8;
  config.max_num_seqs = 2;
  config.forecast_growth = false;  // so that more start than fit
  Reset(config);
  for (; next_ <= 3; ++next_) {
    ASSERT_TRUE(h_->Add(RequestBuilder(next_).Prompt(4).MaxTokens(20)).ok());
  }
  for (int i = 0; i < 40 && h_->scheduler.Stats().preemptions == 0; ++i) h_->Step();
  ASSERT_EQ(h_->scheduler.Stats().preemptions, 1u);
  h_->scheduler.Cancel(RequestId(3));
  ASSERT_EQ(h_->scheduler.Stats().waiting, 1u);
  while (h_->scheduler.Stats().waiting > 0) h_->Step();
  ASSERT_EQ(h_->scheduler.Stats().running, 1u);
  h_->now_ms += kHourMs;
  EXPECT_LE(DelayOfABusyQueue(), 3);
  EXPECT_EQ(h_->EventsOf<StartedEvent>().size(), 3u);
}

}  // namespace
}  // namespace lockstep
