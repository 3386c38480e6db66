#include "tests/sim/sim_worker.h"

#include "absl/strings/str_cat.h"
#include "tests/sim/sim_model.h"

namespace lockstep::sim {
namespace {

ExecutorLimits LimitsOf(const SchedulerConfig& c) {
  return {.max_num_seqs = c.max_num_seqs,
          .max_batched_tokens = c.max_batched_tokens,
          .max_model_len = c.max_model_len,
          .block_size = c.block_size,
          .num_kv_blocks = c.num_kv_blocks,
          .vocab_size = c.vocab_size};
}

}  // namespace

SimWorker::SimWorker(const SchedulerConfig& config, uint64_t epoch, const PoisonSet* poison)
    : config_(config),
      book_(LimitsOf(config), epoch),
      slots_(config.max_num_seqs),
      kv_(size_t{config.num_kv_blocks} * config.block_size),
      poison_(poison) {}

void SimWorker::Know(Slot* slot, TokenId token) {
  const uint64_t before = slot->prefix_hashes.empty() ? 1 : slot->prefix_hashes.back();
  slot->known.push_back(token);
  slot->prefix_hashes.push_back(Mix(before, token));
}

absl::StatusOr<StepResult> SimWorker::Run(const StepPlan& plan) {
  absl::StatusOr<std::vector<BatchSpan>> spans = book_.Check(plan);
  if (!spans.ok()) return spans.status();
  book_.Apply(plan, *spans);
  for (const lockstep::Slot slot : plan.finished_slots) slots_[slot.value] = Slot();
  for (const NewSequence& s : plan.new_sequences) {
    Slot& slot = slots_[s.slot.value];
    slot.num_prompt = s.num_prompt_tokens;
    slot.blocks = s.block_ids;
    slot.sampling = s.sampling;
    for (const TokenId token : s.tokens) Know(&slot, token);
  }
  for (const GrownTable& grown : plan.grown_tables) {
    std::vector<BlockId>& blocks = slots_[grown.slot.value].blocks;
    blocks.insert(blocks.end(), grown.block_ids.begin(), grown.block_ids.end());
  }
  StepResult result;
  result.epoch = plan.epoch;
  result.step = plan.step;
  result.digest = plan.digest;
  for (const BatchSpan& span : *spans) {
    absl::Status status = Compute(span, &slots_[span.slot.value], &result);
    if (!status.ok()) return status;
  }
  return result;
}

absl::Status SimWorker::Compute(const BatchSpan& span, Slot* slot, StepResult* result) {
  const uint32_t end = span.begin + span.count;
  for (uint32_t p = 0; p < end; ++p) {
    const BlockId block = slot->blocks[p / config_.block_size];
    uint64_t& kv = kv_[size_t{block.value} * config_.block_size + p % config_.block_size];
    if (p >= span.begin) {
      kv = slot->prefix_hashes[p];
    } else if (kv != slot->prefix_hashes[p]) {
      return absl::DataLossError(absl::StrCat("step ", result->step, ", slot ", span.slot.value,
                                              ": the KV of position ", p, " in block ", block.value,
                                              " was computed from other tokens"));
    }
  }
  const SlotSampling& sampling = slot->sampling;
  if (sampling.prompt_logprobs >= 0 && span.begin + 1 < slot->num_prompt) {
    SlotPromptLogprobs list{.slot = span.slot, .first_position = span.begin + 1, .entries = {}};
    for (uint32_t p = span.begin + 1; p <= end && p < slot->num_prompt; ++p) {
      TokenLogprobs entry;
      entry.rank = ScoreOf(slot->prefix_hashes[p - 1], slot->known[p]);
      list.entries.push_back(entry);
    }
    result->prompt_logprobs.push_back(std::move(list));
  }
  if (!span.samples) return absl::OkStatus();
  SampledToken sampled;
  sampled.slot = span.slot;
  const uint32_t num_known = static_cast<uint32_t>(slot->known.size());
  const bool masked = num_known - slot->num_prompt < sampling.min_tokens;
  const uint64_t prefix = slot->prefix_hashes.back();
  sampled.token =
      NextToken(prefix, sampling.seed, masked ? sampling.ending_ids : std::vector<TokenId>());
  if (poison_->contains({sampling.seed, num_known})) {
    sampled.poisoned = true;
  } else if (sampling.logprobs >= 0) {
    sampled.has_logprobs = true;
    sampled.logprobs.rank = ScoreOf(prefix, sampled.token);
  }
  result->sampled.push_back(sampled);
  Know(slot, sampled.token);
  return absl::OkStatus();
}

}  // namespace lockstep::sim
