#include "worker/fault_injection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "tests/fakes/fake_host.h"
#include "worker/comm/gloo_communicator.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(FaultInjection, ParsesListsOfFaultsWithConditions) {
  const auto faults = ParseFaults("hang@step=4,rank=1;exit@phase=load,epoch=2;slow@ms=20");
  ASSERT_TRUE(faults.ok()) << faults.status();
  ASSERT_EQ(faults->size(), 3u);
  EXPECT_EQ((*faults)[0].name, "hang");
  EXPECT_EQ((*faults)[0].step, 4u);
  EXPECT_EQ((*faults)[0].rank, 1u);
  EXPECT_EQ((*faults)[1].phase, "load");
  EXPECT_EQ((*faults)[1].epoch, 2u);
  EXPECT_EQ((*faults)[2].ms, 20u);
  EXPECT_TRUE(ParseFaults("")->empty());
}

TEST(FaultInjection, NamesWhatItDoesNotUnderstand) {
  for (const char* spec : {"burn@step=1", "hang", "hang@token=1", "slow@step=2", "exit@phase=lunch",
                           "hang@step=x", "hang@step", "die@=3"}) {
    const auto faults = ParseFaults(spec);
    ASSERT_EQ(faults.status().code(), absl::StatusCode::kInvalidArgument) << spec;
    EXPECT_THAT(std::string(faults.status().message()), HasSubstr("--inject"));
  }
}

struct Rig {
  explicit Rig(const std::string& spec) : control(std::make_shared<fakes::HostControl>()) {
    MakeCommunicator make = [this](const CommunicatorOptions& options) {
      skips = options.skips;
      nccl_only = options.nccl_only;
      return MakeGlooCommunicator(options);
    };
    host = InjectFaults(*ParseFaults(spec), std::make_unique<fakes::FakeHost>(control), &make);
    comm = make({.id = "t", .rank = 0, .size = 1, .bind_address = "127.0.0.1", .max_skew_ms = 0});
    worker::v1::Configure configure;
    configure.set_epoch(1);
    EXPECT_TRUE(host->Load(configure, [](uint64_t, uint64_t) {}).ok());
    EXPECT_TRUE(host->Begin(1, comm.get()).ok());
  }
  absl::StatusOr<StepResult> Step(uint64_t step, std::vector<TokenId> prompt = {}) {
    StepPlan plan;
    plan.epoch = 1;
    plan.step = step;
    if (!prompt.empty()) {
      NewSequence sequence;
      sequence.tokens = std::move(prompt);
      sequence.num_prompt_tokens = static_cast<uint32_t>(sequence.tokens.size());
      plan.new_sequences = {sequence};
    }
    if (absl::Status status = host->Submit(plan, 1); !status.ok()) return status;
    return host->Collect();
  }

  std::shared_ptr<fakes::HostControl> control;
  std::unique_ptr<ModelHost> host;
  std::unique_ptr<RankCommunicator> comm;
  std::function<bool()> skips;  // what a communicator of GPUs asks
  bool nccl_only = false;
};

TEST(FaultInjection, ActsAtItsStepAlone) {
  Rig rig("lie_digest@step=2;lie_token@step=3;fail@step=4;skip_collective@step=5");
  EXPECT_EQ(rig.Step(1)->digest, 0u);
  EXPECT_EQ(rig.Step(2)->digest, 1u);
  EXPECT_EQ(rig.Step(3)->sampled[0].token, 0xffffffffu);
  EXPECT_FALSE(rig.Step(4).ok());
  EXPECT_EQ(rig.Step(5)->num_collectives, 0u);
  EXPECT_EQ(rig.Step(6)->num_collectives, 1u);
  EXPECT_EQ(rig.Step(6)->sampled[0].token, 6u);
}

// A GPU's all-reduces do not come by here: its communicator asks.
TEST(FaultInjection, TellsADeviceWhichAllReduceToLeaveOut) {
  Rig rig("skip_collective@step=2,rank=0");
  StepPlan plan;
  plan.epoch = 1;
  for (plan.step = 1; plan.step <= 3; ++plan.step) {
    ASSERT_TRUE(rig.host->Submit(plan, 1).ok());
    EXPECT_EQ(rig.skips(), plan.step == 2);
    EXPECT_FALSE(rig.skips()) << "one, not all of the step's";
    ASSERT_TRUE(rig.host->Collect().ok());
  }
}

TEST(FaultInjection, LeavesEveryCollectiveToNcclWhereAsked) {
  EXPECT_TRUE(Rig("no_peers@phase=communicator").nccl_only);
  EXPECT_FALSE(Rig("slow@ms=0").nccl_only);
}

TEST(FaultInjection, PoisonsTheSequenceThatHasTheToken) {
  Rig rig("poison@token=7");
  EXPECT_FALSE(rig.Step(1, {1, 2, 3})->sampled[0].poisoned);
  EXPECT_TRUE(rig.Step(2, {1, 7, 3})->sampled[0].poisoned);
}

TEST(FaultInjection, EndsTheProcessWhenAPromptHasTheToken) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        Rig rig("die@token=7");
        (void)rig.Step(1, {1, 2});
        (void)rig.Step(2, {7});
      },
      testing::ExitedWithCode(kInjectedExitCode), "poison request");
  EXPECT_EXIT(Rig("exit@phase=kv"), testing::ExitedWithCode(kInjectedExitCode), "phase kv");
}

TEST(FaultInjection, WaitsForItsEpochAndRank) {
  Rig rig("fail@step=1,epoch=2;fail@step=2,rank=1");
  EXPECT_TRUE(rig.Step(1).ok());
  EXPECT_TRUE(rig.Step(2).ok());
}

}  // namespace
}  // namespace lockstep
