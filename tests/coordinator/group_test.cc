// The worker group over real gRPC streams, with workers that misbehave.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/group/grpc_worker_group.h"
#include "tests/fakes/fake_worker.h"
#include "wire/plan_digest.h"

namespace lockstep {
namespace {

using std::chrono::steady_clock;
using ::testing::AllOf;
using ::testing::HasSubstr;

double SecondsSince(steady_clock::time_point start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

class GroupTest : public ::testing::TestWithParam<const char*> {
 protected:
  void Listen(uint32_t tp_size) {
    options_.tp_size = tp_size;
    options_.configure.set_block_size(4);
    options_.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{64, 8}; };
    auto group = GrpcWorkerGroup::Listen(Address(), options_);
    ASSERT_TRUE(group.ok()) << group.status();
    group_ = *std::move(group);
    group_->Start([this](GroupEvent event) {
      const std::lock_guard lock(mutex_);
      events_.push_back(std::move(event));
      changed_.notify_all();
    });
  }
  std::string Address() const {
    if (std::string(GetParam()) == "unix") {
      return absl::StrCat("unix:", ::testing::TempDir(), "/group-", getpid(), ".sock");
    }
    return "127.0.0.1:0";
  }
  std::unique_ptr<FakeWorker> Worker(FakeWorkerOptions options = {}) {
    options.address = group_->address();
    return std::make_unique<FakeWorker>(options);
  }

  template <typename Event>
  bool WaitFor(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30),
                             [&] { return CountLocked<Event>() >= count; });
  }
  template <typename Event>
  size_t CountLocked() const {
    size_t count = 0;
    for (const GroupEvent& event : events_) count += std::holds_alternative<Event>(event) ? 1 : 0;
    return count;
  }
  template <typename Event>
  Event Last() {
    const std::lock_guard lock(mutex_);
    Event last;
    for (const GroupEvent& event : events_) {
      if (const Event* e = std::get_if<Event>(&event)) last = *e;
    }
    return last;
  }
  std::string Reason() { return std::string(Last<GroupFailed>().reason.message()); }

  // A plan that runs one new sequence, and then one token of it a step.
  StepPlan Plan(uint64_t epoch, uint64_t step) {
    StepPlan plan;
    plan.epoch = epoch;
    plan.step = step;
    PlanDigest digest(epoch, step);
    if (step == 1) {
      NewSequence sequence;
      sequence.tokens = {1, 2, 3};
      sequence.num_prompt_tokens = 3;
      for (uint32_t block = 0; block < 8; ++block) sequence.block_ids.emplace_back(block);
      plan.new_sequences = {sequence};
      plan.spans = {{Slot(0), 3}};
      digest.Add(Slot(0), 0, 3, 8, true);
    } else {
      plan.spans = {{Slot(0), 1}};
      digest.Add(Slot(0), static_cast<uint32_t>(step + 1), 1, 8, true);
    }
    plan.digest = digest.value();
    return plan;
  }

  GroupOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<GroupEvent> events_;
  std::unique_ptr<GrpcWorkerGroup> group_;  // last: its threads use the above
};

TEST_P(GroupTest, FormsStepsAndShutsDown) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  const GroupFormed formed = Last<GroupFormed>();
  EXPECT_EQ(formed.num_kv_blocks, 64u);
  ASSERT_EQ(formed.ranks.size(), 2u);
  EXPECT_EQ(formed.ranks[0].collective_library, "fake collectives 1.0");
  for (uint64_t step = 1; step <= 20; ++step) {
    group_->Send(Plan(1, step));
    ASSERT_TRUE(WaitFor<GroupStep>(step - 1));  // two in flight
  }
  ASSERT_TRUE(WaitFor<GroupStep>(20));
  EXPECT_EQ(Last<GroupStep>().result.step, 20u);
  EXPECT_EQ(Last<GroupStep>().result.sampled.size(), 1u);
  EXPECT_EQ(Last<GroupStep>().timings.size(), 2u);
  EXPECT_EQ(a->plans(), b->plans());  // byte for byte
  EXPECT_EQ(a->plans().size(), 20u);
  EXPECT_EQ(a->complaint() + b->complaint(), "");
  group_->Shutdown();
  EXPECT_TRUE(a->WaitForEnd());
  EXPECT_TRUE(b->WaitForEnd());
  EXPECT_TRUE(a->told_to_shut_down());
  EXPECT_TRUE(b->told_to_shut_down());
}

TEST_P(GroupTest, AKilledWorkerIsKnownWithin250MsAndReplaced) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  const bool b_is_rank_1 = b->WaitForEpoch(1) && b->configure().rank() == 1;
  auto& victim = b_is_rank_1 ? b : a;
  auto& survivor = b_is_rank_1 ? a : b;
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupStep>(1));
  const auto killed = steady_clock::now();
  victim->Die();
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_LT(SecondsSince(killed), 0.25);
  EXPECT_EQ(Last<GroupFailed>().rank, 1);
  EXPECT_THAT(Reason(), HasSubstr(absl::StrCat("rank 1 (host:", victim->pid(), ")")));
  EXPECT_TRUE(survivor->WaitForClose(1));
  auto fresh = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(2));
  EXPECT_EQ(Last<GroupFormed>().epoch, 2u);
  EXPECT_EQ(survivor->configure().rank(), 0u);  // it keeps its weights
  EXPECT_EQ(fresh->configure().rank(), 1u);
  EXPECT_EQ(fresh->configure().num_kv_blocks(), 64u);
  group_->Send(Plan(1, 2));  // of the old epoch: dropped
  group_->Send(Plan(2, 1));
  ASSERT_TRUE(WaitFor<GroupStep>(2));
  EXPECT_EQ(Last<GroupStep>().result.epoch, 2u);
}

TEST_P(GroupTest, AFrozenWorkerIsFoundWithinThreeSeconds) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  const auto frozen = steady_clock::now();
  b->Freeze();
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_LT(SecondsSince(frozen), 3.0);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("no sign of life"), HasSubstr(absl::StrCat(b->pid()))));
  b->Thaw();
  EXPECT_TRUE(b->WaitForEnd());  // it was cut off meanwhile
}

TEST_P(GroupTest, AStepThatOneRankSitsOnIsFound) {
  options_.timeouts.step.floor_ms = 300;
  options_.timeouts.step.first_step_ms = 300;
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->HoldResults(true);
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_THAT(Reason(), AllOf(HasSubstr(absl::StrCat(b->pid())), HasSubstr("step 1")));
}

TEST_P(GroupTest, AWrongDigestIsATypedErrorAtThatStep) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->LieAboutDigest(true);
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_THAT(Reason(), AllOf(HasSubstr(absl::StrCat(b->pid())), HasSubstr("digest")));
  EXPECT_TRUE(b->WaitForEnd());
  auto c = Worker();
  EXPECT_TRUE(WaitFor<GroupFormed>(2));
}

TEST_P(GroupTest, ASkippedCollectiveIsATypedErrorAtThatStep) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->SkipACollective(true);
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_THAT(Reason(), HasSubstr("collectives"));
}

TEST_P(GroupTest, AWorkerThatReportsAnErrorIsNamedAndStays) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->FailNextStep(13, "decoder: out of memory", /*recoverable=*/true);
  group_->Send(Plan(1, 1));
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_THAT(Reason(), AllOf(HasSubstr(absl::StrCat(b->pid())), HasSubstr("out of memory")));
  ASSERT_TRUE(WaitFor<GroupFormed>(2));  // with the same two
  group_->Send(Plan(2, 1));
  EXPECT_TRUE(WaitFor<GroupStep>(1));
}

TEST_P(GroupTest, ABadCheckpointIsFatalAndNamed) {
  Listen(2);
  auto a = Worker();
  FakeWorkerOptions bad;
  bad.load_failure = "model-00002.safetensors: 12 bytes short";
  auto b = Worker(bad);
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_TRUE(Last<GroupFailed>().fatal);
  EXPECT_THAT(Reason(), AllOf(HasSubstr(absl::StrCat(b->pid())), HasSubstr("12 bytes short")));
}

TEST_P(GroupTest, DeathWhileLoadingIsNamedWithinThreeSeconds) {
  Listen(2);
  FakeWorkerOptions slow;
  slow.load = false;
  auto a = Worker(), b = Worker(slow);
  ASSERT_TRUE(b->WaitForEpoch(1));
  const auto killed = steady_clock::now();
  b->Die();
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_LT(SecondsSince(killed), 3.0);
  EXPECT_THAT(Reason(), HasSubstr(absl::StrCat(b->pid())));
  auto c = Worker();
  EXPECT_TRUE(WaitFor<GroupFormed>(1));
}

TEST_P(GroupTest, ASurvivorThatDoesNotLetGoIsCutOff) {
  options_.timeouts.release_ms = 300;
  Listen(2);
  FakeWorkerOptions stubborn;
  stubborn.release = false;
  auto a = Worker(stubborn), b = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->Die();
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  auto c = Worker(), d = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(2));
  EXPECT_TRUE(a->WaitForEnd());
}

TEST_P(GroupTest, RefusesAnotherProtocolVersion) {
  Listen(1);
  FakeWorkerOptions old_build;
  old_build.protocol_version = 99;
  auto a = Worker(old_build);
  ASSERT_TRUE(a->WaitForEnd());
  EXPECT_THAT(a->refusal(), HasSubstr("protocol version 99"));
  auto b = Worker();
  EXPECT_TRUE(WaitFor<GroupFormed>(1));
}

TEST_P(GroupTest, GarbageEndsTheEpochNotTheCoordinator) {
  Listen(1);
  auto a = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  a->SendGarbage();
  ASSERT_TRUE(WaitFor<GroupFailed>(1));
  EXPECT_TRUE(a->WaitForEnd());
  auto b = Worker();
  EXPECT_TRUE(WaitFor<GroupFormed>(2));
}

TEST_P(GroupTest, RelaysCommunicatorKeys) {
  Listen(2);
  auto a = Worker(), b = Worker();
  ASSERT_TRUE(a->WaitForEpoch(1));
  a->PublishKey("rank", "10.1.2.3:4567");
  std::string value;
  ASSERT_TRUE(b->WaitForKey("rank", &value));
  EXPECT_EQ(value, "10.1.2.3:4567");
}

TEST_P(GroupTest, EndsWithWorkersAttachedAndFrozen) {
  Listen(2);
  auto a = Worker(), b = Worker(), spare = Worker();
  ASSERT_TRUE(WaitFor<GroupFormed>(1));
  b->Freeze();
  const auto start = steady_clock::now();
  group_.reset();
  EXPECT_LT(SecondsSince(start), 5.0);
  b->Thaw();
}

TEST_P(GroupTest, ManyDeathsLeaveAWorkingGroup) {
  Listen(2);
  std::vector<std::unique_ptr<FakeWorker>> workers;
  workers.push_back(Worker());
  workers.push_back(Worker());
  for (size_t death = 0; death < 5; ++death) {
    ASSERT_TRUE(WaitFor<GroupFormed>(death + 1));
    const uint64_t epoch = Last<GroupFormed>().epoch;
    group_->Send(Plan(epoch, 1));
    ASSERT_TRUE(WaitFor<GroupStep>(death + 1));
    workers[death % 2]->Die();
    ASSERT_TRUE(WaitFor<GroupFailed>(death + 1));
    workers[death % 2] = Worker();
  }
  ASSERT_TRUE(WaitFor<GroupFormed>(6));
}

INSTANTIATE_TEST_SUITE_P(Over, GroupTest, ::testing::Values("unix", "tcp"),
                         [](const auto& param_info) { return std::string(param_info.param); });

TEST(GroupListenTest, ATakenAddressIsAnErrorThatNamesIt) {
  const std::string path = absl::StrCat("unix:", ::testing::TempDir(), "/taken-", getpid());
  GroupOptions options;
  auto first = GrpcWorkerGroup::Listen("127.0.0.1:0", options);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ((*first)->address().find("127.0.0.1:"), 0u);
  const auto second = GrpcWorkerGroup::Listen((*first)->address(), options);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr((*first)->address()));
  auto third = GrpcWorkerGroup::Listen(path, options);
  ASSERT_TRUE(third.ok()) << third.status();
  const auto fourth = GrpcWorkerGroup::Listen(path, options);
  ASSERT_FALSE(fourth.ok());
  EXPECT_THAT(std::string(fourth.status().message()), HasSubstr(path));
  // A file left behind by a dead process is no obstacle.
  third->reset();
  EXPECT_TRUE(GrpcWorkerGroup::Listen(path, options).ok());
}

TEST(GroupListenTest, AnUnusableAddressIsAnError) {
  EXPECT_FALSE(GrpcWorkerGroup::Listen("203.0.113.7:1", {}).ok());
  EXPECT_FALSE(GrpcWorkerGroup::Listen(absl::StrCat("unix:/", std::string(200, 'x')), {}).ok());
  EXPECT_FALSE(GrpcWorkerGroup::Listen("nonsense", {}).ok());
}

}  // namespace
}  // namespace lockstep
