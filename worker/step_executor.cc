#include "worker/step_executor.h"

#include <chrono>
#include <utility>

#include "worker/decoder.h"
#include "worker/slot_book.h"

namespace lockstep {
namespace {

uint64_t NowNs() {
  return static_cast<uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

StepTiming TimingOf(const StepOutput& output, uint64_t received_ns, uint64_t started_ns) {
  const CollectiveStats& comm = output.collectives;
  StepTiming t;
  t.plan_received_ns = received_ns;
  t.started_ns = started_ns;
  t.total_ns = NowNs() - started_ns;
  t.collective_wait_ns = comm.wait_ns;
  t.collective_transfer_ns = comm.transfer_ns;
  t.sampling_ns = output.sampling_ns;
  t.collective_bytes = comm.bytes_sent;
  const uint64_t other = comm.wait_ns + comm.transfer_ns + output.sampling_ns;
  t.compute_ns = t.total_ns > other ? t.total_ns - other : 0;
  return t;
}

}  // namespace

struct StepExecutor::Impl {
  SlotBook book;
  Decoder* decoder;
  absl::Status failure;  // of an earlier step: slots and KV are no longer known
};

StepExecutor::StepExecutor(const ExecutorLimits& limits, uint64_t epoch, Decoder* decoder)
    : impl_(new Impl{SlotBook(limits, epoch), decoder, absl::OkStatus()}) {}

StepExecutor::~StepExecutor() = default;

absl::StatusOr<StepResult> StepExecutor::Run(const StepPlan& plan, uint64_t plan_received_ns) {
  const uint64_t started_ns = NowNs();
  if (!impl_->failure.ok()) return impl_->failure;
  absl::StatusOr<std::vector<BatchSpan>> spans = impl_->book.Check(plan);
  if (!spans.ok()) return spans.status();

  impl_->book.Apply(plan, *spans);
  Decoder& decoder = *impl_->decoder;
  for (const Slot slot : plan.finished_slots) decoder.Release(slot);
  for (const NewSequence& sequence : plan.new_sequences) {
    if (impl_->failure = decoder.Admit(sequence); !impl_->failure.ok()) return impl_->failure;
  }
  for (const GrownTable& grown : plan.grown_tables) decoder.Grow(grown.slot, grown.block_ids);

  absl::StatusOr<StepOutput> output = decoder.Step(*spans);
  if (!output.ok()) return impl_->failure = output.status();

  StepResult result;
  result.epoch = plan.epoch;
  result.step = plan.step;
  result.digest = plan.digest;  // equal to this worker's own: Check compared them
  result.num_collectives = output->collectives.count;
  result.timing = TimingOf(*output, plan_received_ns, started_ns);
  result.sampled = std::move(output->sampled);
  result.prompt_logprobs = std::move(output->prompt_logprobs);
  return result;
}

}  // namespace lockstep
