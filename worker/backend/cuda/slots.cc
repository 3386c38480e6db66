#include "worker/backend/cuda/slots.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/sampler.h"

namespace lockstep::cuda {
namespace {

kernels::SlotParams ToParams(const NewSequence& sequence) {
  const SlotSampling& s = sequence.sampling;
  kernels::SlotParams p;
  p.temperature = s.temperature;
  p.top_p = s.top_p;
  p.min_p = s.min_p;
  p.repetition_penalty = s.repetition_penalty;
  p.presence_penalty = s.presence_penalty;
  p.frequency_penalty = s.frequency_penalty;
  p.top_k = s.top_k;
  p.min_tokens = static_cast<int32_t>(s.min_tokens);
  p.seed = s.seed;
  p.num_prompt_tokens = static_cast<int32_t>(sequence.num_prompt_tokens);
  p.logprobs = s.logprobs;
  p.prompt_logprobs = s.prompt_logprobs;
  p.num_bias = static_cast<int32_t>(s.logit_bias.size());
  p.num_ending_ids = static_cast<int32_t>(s.ending_ids.size());
  return p;
}

}  // namespace

absl::Status Slots::Allocate(const BackendLimits& limits, const ModelConfig& config,
                             const ShardPlan& plan) {
  const size_t slots = limits.max_num_seqs;
  states_.resize(slots);
  first_vocab_ = static_cast<int>(plan.first_vocab);
  columns_ = static_cast<int>(
      std::clamp<int64_t>(config.vocab_size - plan.first_vocab, 0, plan.local_vocab));
  tokens_stride_ = static_cast<int>(limits.max_model_len + 1);
  counts_stride_ = (columns_ + 1) / 2 * 2;
  absl::Status status = tokens_.AllocateZeroed(slots * tokens_stride_, "token tables");
  if (status.ok()) status = params_.AllocateZeroed(slots, "sampling parameters");
  if (status.ok()) status = bias_ids_.AllocateZeroed(slots * kernels::kMaxBias, "logit biases");
  if (status.ok()) status = bias_values_.AllocateZeroed(slots * kernels::kMaxBias, "logit biases");
  if (status.ok()) {
    status = ending_ids_.AllocateZeroed(slots * kernels::kMaxEndingIds, "ending ids");
  }
  if (status.ok()) status = counts_.AllocateZeroed(slots * counts_stride_, "token counts");
  if (status.ok()) status = poisoned_.AllocateZeroed(slots, "slots");
  return status;
}

absl::Status Slots::Reset(cudaStream_t stream) {
  states_.assign(states_.size(), State());
  return ToStatus(cudaMemsetAsync(poisoned_.get(), 0, poisoned_.bytes(), stream), "clearing slots");
}

const Slots::State& Slots::At(Slot slot) const {
  LOCKSTEP_CHECK(slot.value < states_.size() && states_[slot.value].live);
  return states_[slot.value];
}

absl::Status Slots::Admit(cudaStream_t stream, const NewSequence& sequence, StepIo* io) {
  const SlotSampling& sampling = sequence.sampling;
  const size_t slot = sequence.slot.value;
  LOCKSTEP_CHECK(slot < states_.size() && !states_[slot].live);
  LOCKSTEP_CHECK(sequence.tokens.size() < static_cast<size_t>(tokens_stride_));
  if (sampling.logit_bias.size() > kernels::kMaxBias ||
      sampling.ending_ids.size() > kernels::kMaxEndingIds) {
    return absl::InvalidArgumentError(absl::StrCat(
        "slot ", slot, ": ", sampling.logit_bias.size(), " biases and ", sampling.ending_ids.size(),
        " ending ids; at most ", kernels::kMaxBias, " and ", kernels::kMaxEndingIds));
  }
  State& state = states_[slot];
  state = {.live = true, .num_blocks = 0, .params = ToParams(sequence), .needs = {}};
  state.needs = kernels::NeedsOf(state.params);

  absl::Status status = io->Upload(stream, tokens_.get() + slot * tokens_stride_,
                                   sequence.tokens.data(), sequence.tokens.size() * 4);
  if (status.ok()) {
    status = io->Upload(stream, params_.get() + slot, &state.params, sizeof(state.params));
  }
  if (status.ok() && !sampling.logit_bias.empty()) {
    std::vector<int32_t> ids;
    std::vector<float> values;
    for (const auto& [id, value] : sampling.logit_bias) {
      ids.push_back(static_cast<int32_t>(id));
      values.push_back(value);
    }
    const size_t at = slot * kernels::kMaxBias;
    status = io->Upload(stream, bias_ids_.get() + at, ids.data(), ids.size() * 4);
    if (status.ok()) {
      status = io->Upload(stream, bias_values_.get() + at, values.data(), values.size() * 4);
    }
  }
  if (status.ok() && !sampling.ending_ids.empty()) {
    status = io->Upload(stream, ending_ids_.get() + slot * kernels::kMaxEndingIds,
                        sampling.ending_ids.data(), sampling.ending_ids.size() * 4);
  }
  if (status.ok()) {
    status = ToStatus(cudaMemsetAsync(poisoned_.get() + slot, 0, sizeof(uint32_t), stream),
                      "clearing a slot");
  }
  if (status.ok() && HasPenalties(sampling)) {
    status = ToStatus(kernels::BuildTokenCounts(
                          {.stream = stream, .pdl = false},
                          {.counts = counts_.get(),
                           .counts_stride = counts_stride_,
                           .tokens = tokens_.get(),
                           .tokens_stride = tokens_stride_,
                           .slot = static_cast<int>(slot),
                           .num_prompt_tokens = static_cast<int>(sequence.num_prompt_tokens),
                           .num_tokens = static_cast<int>(sequence.tokens.size()),
                           .first_vocab = first_vocab_,
                           .columns = columns_}),
                      "counting a prompt's tokens");
  }
  return status.ok() ? Grow(stream, sequence.slot, sequence.block_ids, io) : status;
}

absl::Status Slots::Grow(cudaStream_t stream, Slot slot, absl::Span<const BlockId> blocks,
                         StepIo* io) {
  State& state = states_[slot.value];
  LOCKSTEP_CHECK(state.live);
  const uint32_t first = state.num_blocks;
  state.num_blocks += static_cast<uint32_t>(blocks.size());
  return io->Grow(stream, slot, first, blocks);
}

void Slots::Release(Slot slot) { states_[slot.value] = State(); }

void Slots::Describe(kernels::SampleArgs* args) const {
  args->first_vocab = first_vocab_;
  args->columns = columns_;
  args->params = params_.get();
  args->bias_ids = bias_ids_.get();
  args->bias_values = bias_values_.get();
  args->ending_ids = ending_ids_.get();
  args->counts = counts_.get();
  args->counts_stride = counts_stride_;
  args->tokens = tokens_.get();
  args->tokens_stride = tokens_stride_;
  args->poisoned = poisoned_.get();
}

}  // namespace lockstep::cuda
