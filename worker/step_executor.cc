#include "worker/step_executor.h"

#include <chrono>
#include <deque>
#include <utility>

#include "worker/decoder.h"
#include "worker/slot_book.h"

namespace lockstep {
namespace {

uint64_t NowNs() {
  return static_cast<uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

// What is known of a step before it is done.
struct InFlight {
  uint64_t epoch = 0, step = 0, digest = 0;
  uint64_t received_ns = 0, started_ns = 0, submitted_ns = 0;
};

// A backend that knows what its device spent says so; otherwise the step is what
// the host spent on enqueueing it.
StepTiming TimingOf(const StepOutput& output, const InFlight& in_flight) {
  const CollectiveStats& comm = output.collectives;
  StepTiming t;
  t.plan_received_ns = in_flight.received_ns;
  t.started_ns = in_flight.started_ns;
  t.total_ns =
      output.device_ns != 0 ? output.device_ns : in_flight.submitted_ns - in_flight.started_ns;
  t.collective_wait_ns = comm.wait_ns;
  t.collective_transfer_ns = comm.transfer_ns + comm.aside_ns;
  t.sampling_ns = output.sampling_ns;
  t.collective_bytes = comm.bytes_sent;
  t.device_idle_ns = output.device_idle_ns;
  const uint64_t other = comm.wait_ns + comm.transfer_ns + output.sampling_ns;
  t.compute_ns = t.total_ns > other ? t.total_ns - other : 0;
  return t;
}

}  // namespace

struct StepExecutor::Impl {
  SlotBook book;
  Decoder* decoder;
  absl::Status failure;  // of an earlier step: slots and KV are no longer known
  std::deque<InFlight> in_flight;
};

StepExecutor::StepExecutor(const ExecutorLimits& limits, uint64_t epoch, Decoder* decoder)
    : impl_(new Impl{SlotBook(limits, epoch), decoder, absl::OkStatus(), {}}) {}

StepExecutor::~StepExecutor() = default;

absl::Status StepExecutor::Submit(const StepPlan& plan, uint64_t plan_received_ns) {
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

  if (impl_->failure = decoder.Submit(*spans); !impl_->failure.ok()) return impl_->failure;
  impl_->in_flight.push_back({.epoch = plan.epoch,
                              .step = plan.step,
                              .digest = plan.digest,  // equal to this worker's own, Check found
                              .received_ns = plan_received_ns,
                              .started_ns = started_ns,
                              .submitted_ns = NowNs()});
  return absl::OkStatus();
}

bool StepExecutor::Done() const { return impl_->decoder->Done(); }

absl::StatusOr<StepResult> StepExecutor::Run(const StepPlan& plan, uint64_t plan_received_ns) {
  if (absl::Status status = Submit(plan, plan_received_ns); !status.ok()) return status;
  return Collect();
}

absl::StatusOr<StepResult> StepExecutor::Collect() {
  if (!impl_->failure.ok()) return impl_->failure;
  absl::StatusOr<StepOutput> output = impl_->decoder->Collect();
  if (!output.ok()) return impl_->failure = output.status();
  const InFlight step = impl_->in_flight.front();
  impl_->in_flight.pop_front();

  StepResult result;
  result.epoch = step.epoch;
  result.step = step.step;
  result.digest = step.digest;
  result.num_collectives = output->collectives.count;
  result.timing = TimingOf(*output, step);
  result.sampled = std::move(output->sampled);
  result.prompt_logprobs = std::move(output->prompt_logprobs);
  return result;
}

}  // namespace lockstep
