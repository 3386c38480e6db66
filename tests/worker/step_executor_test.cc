// What a step's result says of where its time went.
#include "worker/step_executor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "model/model_config.h"
#include "model/shard_plan.h"
#include "wire/plan_digest.h"
#include "worker/backend/backend.h"
#include "worker/decoder.h"

namespace lockstep {
namespace {

// Computes nothing, and says of every step what it was told to.
class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(StepOutput output) : output_(std::move(output)) {}

  absl::Status Attach(Communicator*) override { return absl::OkStatus(); }
  void Admit(const NewSequence&) override {}
  void Grow(Slot, absl::Span<const BlockId>) override {}
  void Release(Slot) override {}
  bool Begin(absl::Span<const BatchSpan>, absl::Span<const LogitRow>) override { return true; }
  void Embed(const EmbedOp&) override {}
  void Qkv(const QkvOp&) override {}
  void Attention(const AttentionOp&) override {}
  void AttentionOutput(int64_t) override {}
  void ReduceResidualNorm(const ReduceOp&) override {}
  void GateUp(int64_t) override {}
  void Down(int64_t) override {}
  void Logits(absl::Span<const LogitRow>) override {}
  void Sample(absl::Span<const LogitRow>) override {}
  absl::Status Submit() override { return absl::OkStatus(); }
  bool Done() override { return true; }
  absl::StatusOr<StepOutput> Collect() override { return output_; }
  bool Drain() override { return true; }
  int64_t max_logit_rows() const override { return 1; }
  int64_t weight_bytes() const override { return 0; }
  int64_t kv_bytes() const override { return 0; }
  std::string description() const override { return "timed"; }

 private:
  const StepOutput output_;
};

StepTiming TimingOf(StepOutput output) {
  Decoder decoder(ModelConfig(), ShardPlan(), std::make_unique<TimedBackend>(std::move(output)));
  StepExecutor executor({}, 1, &decoder);
  StepPlan plan;
  plan.epoch = plan.step = 1;
  plan.digest = PlanDigest(1, 1).value();
  const absl::StatusOr<StepResult> result = executor.Run(plan, 77);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? result->timing : StepTiming();
}

TEST(StepExecutorTest, ComputingIsWhatIsLeftOfTheDevicesTime) {
  const StepTiming t = TimingOf(
      {.sampled = {},
       .prompt_logprobs = {},
       .collectives =
           {.count = 3, .wait_ns = 200, .transfer_ns = 30, .aside_ns = 4'000, .bytes_sent = 96},
       .sampling_ns = 50,
       .device_ns = 1'000,
       .device_idle_ns = 6});
  EXPECT_EQ(t.plan_received_ns, 77u);
  EXPECT_EQ(t.total_ns, 1'000u);
  EXPECT_EQ(t.collective_wait_ns, 200u);
  EXPECT_EQ(t.collective_transfer_ns, 4'030u);  // beside the step's other work, most of it
  EXPECT_EQ(t.sampling_ns, 50u);
  EXPECT_EQ(t.compute_ns, 1'000u - 200 - 30 - 50);
  EXPECT_EQ(t.collective_bytes, 96u);
  EXPECT_EQ(t.device_idle_ns, 6u);
}

}  // namespace
}  // namespace lockstep
