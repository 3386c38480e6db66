#include "worker/backend/cuda/sampling.h"

#include <algorithm>
#include <utility>

namespace lockstep::cuda {
namespace {

using kernels::HasPhase;
using kernels::SampleExchangeBytes;
using kernels::SamplePhase;

}  // namespace

absl::Status Sampling::Allocate(const ShardPlan& plan, int64_t turn_rows, int64_t step_rows) {
  rank_ = static_cast<int>(plan.rank);
  tp_size_ = static_cast<int>(plan.tp_size);
  logits_stride_ = (plan.local_vocab + 3) / 4 * 4;
  absl::Status status = logits_.AllocateZeroed(turn_rows * logits_stride_, "logits");
  for (const SamplePhase phase : kernels::kSamplePhases) {
    const size_t bytes = turn_rows * SampleExchangeBytes(phase);
    if (status.ok()) status = send_[phase].AllocateZeroed(bytes, "sampling");
    if (status.ok() && tp_size_ > 1) {
      status = gathered_[phase].AllocateZeroed(bytes * tp_size_, "sampling");
    }
  }
  const kernels::SampleNeeds all = {
      .adjust = true, .draw = true, .cut = true, .nested = true, .score = true};
  if (status.ok()) {
    status =
        workspace_.AllocateZeroed(kernels::SampleWorkspaceBytes(all, static_cast<int>(turn_rows),
                                                                static_cast<int>(plan.local_vocab)),
                                  "sampling");
  }
  if (status.ok()) status = results_.AllocateZeroed(step_rows, "results");
  if (status.ok()) status = logprobs_.AllocateZeroed(step_rows, "results");
  return status;
}

absl::Status Sampling::Reset(cudaStream_t stream) {
  // Batches that did not end leave their words behind.
  Buffer<std::byte>& words = send_[kernels::kMaximum];
  return ToStatus(cudaMemsetAsync(words.get(), 0, words.bytes(), stream), "clearing sampling");
}

absl::Status Sampling::Run(const kernels::Launch& launch, kernels::SampleArgs args, int first,
                           Collectives* collectives) {
  args.rank = rank_;
  args.tp_size = tp_size_;
  args.logits = logits_.get();
  args.logits_stride = logits_stride_;
  args.results = results_.get() + first;
  args.logprobs = logprobs_.get() + first;
  args.workspace = workspace_.get();
  for (const SamplePhase phase : kernels::kSamplePhases) {
    args.send[phase] = send_[phase].get();
    args.gathered[phase] = tp_size_ == 1 ? send_[phase].get() : gathered_[phase].get();
  }
  for (const SamplePhase phase : kernels::kSamplePhases) {
    if (!HasPhase(args.needs, phase)) continue;
    absl::Status status = ToStatus(kernels::RunSamplePhase(launch, phase, args), "sampling");
    const size_t bytes = args.rows * SampleExchangeBytes(phase);
    if (status.ok() && tp_size_ > 1 && bytes > 0) {
      status = collectives->AllGather(launch, args.send[phase], args.gathered[phase], bytes);
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

void AppendResult(const LogitRow& row, Slot slot, uint32_t position,
                  const kernels::SampledRow& result, const kernels::RowLogprobs& logprobs,
                  StepOutput* output) {
  TokenLogprobs scored;
  const bool has_logprobs = (result.flags & kernels::kSampledLogprobs) != 0;
  if (has_logprobs) {
    scored.logprob = logprobs.logprob;
    scored.rank = logprobs.rank;
    const uint32_t count = std::min<uint32_t>(logprobs.num_top, kernels::kMaxTopLogprobs);
    for (uint32_t i = 0; i < count; ++i) {
      scored.top.emplace_back(static_cast<TokenId>(logprobs.top_id[i]), logprobs.top_logprob[i]);
    }
  }
  if (row.samples) {
    SampledToken& token = output->sampled.emplace_back();
    token.slot = slot;
    token.token = static_cast<TokenId>(result.token);
    token.poisoned = (result.flags & kernels::kSampledPoisoned) != 0;
    token.has_logprobs = has_logprobs && !token.poisoned;
    if (token.has_logprobs) token.logprobs = std::move(scored);
    return;
  }
  std::vector<SlotPromptLogprobs>& lists = output->prompt_logprobs;
  if (lists.empty() || lists.back().slot != slot) lists.push_back({slot, position + 1, {}});
  lists.back().entries.push_back(std::move(scored));
}

}  // namespace lockstep::cuda
