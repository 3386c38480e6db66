#include "worker/slot_book.h"

#include <algorithm>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "wire/plan_digest.h"

namespace lockstep {
namespace {

template <typename... Args>
absl::Status Refuse(const StepPlan& plan, const Args&... what) {
  return absl::InvalidArgumentError(absl::StrCat("plan of step ", plan.step, ": ", what...));
}

bool InRange(float x, float low, float high) { return x >= low && x <= high; }  // false for NaN

// The first field that is out of its range; empty when none is.
std::string BadSampling(const SlotSampling& s, uint32_t vocab_size) {
  constexpr float kAny = 1e9f;  // finite; the coordinator's limits are narrower
  if (!InRange(s.temperature, 0.0f, kAny)) return "temperature";
  if (!InRange(s.top_p, 0.0f, 1.0f) || s.top_p == 0.0f) return "top_p";
  if (!InRange(s.min_p, 0.0f, 1.0f)) return "min_p";
  if (!InRange(s.repetition_penalty, kMinRepetitionPenalty, kAny)) return "repetition_penalty";
  if (!InRange(s.presence_penalty, -kAny, kAny)) return "presence_penalty";
  if (!InRange(s.frequency_penalty, -kAny, kAny)) return "frequency_penalty";
  for (const auto& [id, bias] : s.logit_bias) {
    if (id >= vocab_size || !InRange(bias, -kAny, kAny)) return "logit_bias";
  }
  for (const TokenId id : s.ending_ids) {
    if (id >= vocab_size) return "ending_ids";
  }
  const int64_t vocab = vocab_size;
  if (s.logprobs < -1 || s.logprobs > vocab) return "logprobs";
  if (s.prompt_logprobs < -1 || s.prompt_logprobs > vocab) return "prompt_logprobs";
  return "";
}

}  // namespace

// The slots as they will be once the plan is applied: a copy of each slot that
// the plan changes, and by how much each block's use count does.
class SlotBook::Draft {
 public:
  Draft(const SlotBook& book, const StepPlan& plan) : book_(book), plan_(plan) {}

  absl::Status Finish(Slot slot);
  absl::Status Admit(const NewSequence& sequence);
  absl::Status Grow(const GrownTable& grown);
  absl::StatusOr<BatchSpan> Resolve(const Span& span);
  uint32_t table_length(Slot slot) const { return static_cast<uint32_t>(At(slot).table.size()); }

 private:
  bool InRange(Slot slot) const { return slot.value < book_.limits_.max_num_seqs; }
  const SlotState& At(Slot slot) const {
    const auto it = changed_.find(slot);
    return it != changed_.end() ? it->second : book_.slots_[slot.value];
  }
  absl::Status CheckBlocks(Slot slot, const std::vector<BlockId>& table, size_t first_new);
  void AddUses(const std::vector<BlockId>& blocks, size_t first, int32_t uses) {
    for (size_t i = first; i < blocks.size(); ++i) uses_[blocks[i]] += uses;
  }
  uint32_t Uses(BlockId block) const {
    const auto it = uses_.find(block);
    return static_cast<uint32_t>(static_cast<int64_t>(book_.block_uses_[block.value]) +
                                 (it == uses_.end() ? 0 : it->second));
  }

  const SlotBook& book_;
  const StepPlan& plan_;
  absl::flat_hash_map<Slot, SlotState> changed_;
  absl::flat_hash_map<BlockId, int32_t> uses_;
  absl::flat_hash_set<Slot> spanned_;
};

absl::Status SlotBook::Draft::Finish(Slot slot) {
  if (!InRange(slot) || !At(slot).live) {
    return Refuse(plan_, "finished slot ", slot.value, " is not live");
  }
  AddUses(At(slot).table, 0, -1);
  changed_[slot] = SlotState();
  return absl::OkStatus();
}

// table[first_new...] has just been appended.
absl::Status SlotBook::Draft::CheckBlocks(Slot slot, const std::vector<BlockId>& table,
                                          size_t first_new) {
  const ExecutorLimits& limits = book_.limits_;
  const uint64_t most =
      (uint64_t{limits.max_model_len} + limits.block_size - 1) / limits.block_size;
  if (table.size() > most) {
    return Refuse(plan_, "slot ", slot.value, " has ", table.size(), " blocks; max_model_len ",
                  limits.max_model_len, " needs at most ", most);
  }
  for (size_t i = first_new; i < table.size(); ++i) {
    if (table[i].value >= limits.num_kv_blocks) {
      return Refuse(plan_, "slot ", slot.value, " names block ", table[i].value, " of ",
                    limits.num_kv_blocks);
    }
  }
  const BlockId* twice = nullptr;
  std::vector<BlockId> sorted;
  if (table.size() - first_new <= 2) {  // the usual growth: no need to sort
    for (size_t i = first_new; i < table.size(); ++i) {
      if (std::find(table.begin(), table.begin() + i, table[i]) != table.begin() + i) {
        twice = &table[i];
      }
    }
  } else {
    sorted = table;
    std::sort(sorted.begin(), sorted.end());
    const auto found = std::adjacent_find(sorted.begin(), sorted.end());
    if (found != sorted.end()) twice = &*found;
  }
  if (twice != nullptr) {
    return Refuse(plan_, "slot ", slot.value, " holds block ", twice->value, " twice");
  }
  return absl::OkStatus();
}

absl::Status SlotBook::Draft::Admit(const NewSequence& s) {
  const ExecutorLimits& limits = book_.limits_;
  const uint32_t slot = s.slot.value;
  if (!InRange(s.slot)) return Refuse(plan_, "new slot ", slot, " of ", limits.max_num_seqs);
  if (At(s.slot).live) return Refuse(plan_, "new slot ", slot, " is still live");
  if (s.tokens.empty() || s.tokens.size() > limits.max_model_len) {
    return Refuse(plan_, "new slot ", slot, " has ", s.tokens.size(), " tokens; 1 to ",
                  limits.max_model_len, " fit");
  }
  if (s.num_prompt_tokens == 0 || s.num_prompt_tokens > s.tokens.size()) {
    return Refuse(plan_, "new slot ", slot, " has ", s.num_prompt_tokens, " prompt tokens of ",
                  s.tokens.size());
  }
  if (s.num_computed_tokens >= s.tokens.size()) {
    return Refuse(plan_, "new slot ", slot, " has ", s.num_computed_tokens, " tokens computed of ",
                  s.tokens.size(), "; the last is always computed");
  }
  for (const TokenId token : s.tokens) {
    if (token >= limits.vocab_size) {
      return Refuse(plan_, "new slot ", slot, " has token ", token, " of a vocabulary of ",
                    limits.vocab_size);
    }
  }
  if (absl::Status status = CheckBlocks(s.slot, s.block_ids, 0); !status.ok()) return status;
  if (uint64_t{s.num_computed_tokens} > s.block_ids.size() * uint64_t{limits.block_size}) {
    return Refuse(plan_, "new slot ", slot, " has ", s.num_computed_tokens,
                  " tokens computed but only ", s.block_ids.size(), " blocks");
  }
  if (const std::string bad = BadSampling(s.sampling, limits.vocab_size); !bad.empty()) {
    return Refuse(plan_, "new slot ", slot, ": sampling.", bad, " is out of range");
  }
  AddUses(s.block_ids, 0, 1);
  changed_[s.slot] = {.live = true,
                      .known = static_cast<uint32_t>(s.tokens.size()),
                      .computed = s.num_computed_tokens,
                      .table = s.block_ids};
  return absl::OkStatus();
}

absl::Status SlotBook::Draft::Grow(const GrownTable& grown) {
  if (!InRange(grown.slot) || !At(grown.slot).live) {
    return Refuse(plan_, "grown slot ", grown.slot.value, " is not live");
  }
  SlotState state = At(grown.slot);
  const size_t first_new = state.table.size();
  state.table.insert(state.table.end(), grown.block_ids.begin(), grown.block_ids.end());
  if (absl::Status status = CheckBlocks(grown.slot, state.table, first_new); !status.ok()) {
    return status;
  }
  AddUses(state.table, first_new, 1);
  changed_[grown.slot] = std::move(state);
  return absl::OkStatus();
}

absl::StatusOr<BatchSpan> SlotBook::Draft::Resolve(const Span& span) {
  const uint32_t slot = span.slot.value;
  if (!InRange(span.slot) || !At(span.slot).live) {
    return Refuse(plan_, "slot ", slot, " of a span is not live");
  }
  if (!spanned_.insert(span.slot).second) return Refuse(plan_, "slot ", slot, " has two spans");
  const SlotState& state = At(span.slot);
  if (span.num_tokens == 0 || span.num_tokens > state.known - state.computed) {
    return Refuse(plan_, "slot ", slot, " is to compute ", span.num_tokens, " tokens; ",
                  state.known - state.computed, " are known and not computed");
  }
  const uint32_t end = state.computed + span.num_tokens, size = book_.limits_.block_size;
  if (end > book_.limits_.max_model_len) {
    return Refuse(plan_, "slot ", slot, " is to compute position ", end - 1, "; max_model_len is ",
                  book_.limits_.max_model_len);
  }
  if (uint64_t{end} > state.table.size() * uint64_t{size}) {
    return Refuse(plan_, "slot ", slot, " is to compute up to position ", end - 1, " with only ",
                  state.table.size(), " blocks of ", size);
  }
  for (uint32_t i = state.computed / size; i <= (end - 1) / size; ++i) {
    if (Uses(state.table[i]) != 1) {
      return Refuse(plan_, "slot ", slot, " is to write block ", state.table[i].value,
                    ", which another slot holds too");
    }
  }
  return BatchSpan{.slot = span.slot,
                   .begin = state.computed,
                   .count = span.num_tokens,
                   .samples = end == state.known};
}

SlotBook::SlotBook(const ExecutorLimits& limits, uint64_t epoch)
    : limits_(limits),
      epoch_(epoch),
      slots_(limits.max_num_seqs),
      block_uses_(limits.num_kv_blocks) {
  LOCKSTEP_CHECK(limits.block_size > 0);
}

absl::StatusOr<std::vector<BatchSpan>> SlotBook::Check(const StepPlan& plan) const {
  if (plan.epoch != epoch_) return Refuse(plan, "it is of epoch ", plan.epoch, ", not ", epoch_);
  if (plan.step != last_step_ + 1) return Refuse(plan, "the next step is ", last_step_ + 1);

  Draft draft(*this, plan);
  for (const Slot slot : plan.finished_slots) {
    if (absl::Status status = draft.Finish(slot); !status.ok()) return status;
  }
  for (const NewSequence& sequence : plan.new_sequences) {
    if (absl::Status status = draft.Admit(sequence); !status.ok()) return status;
  }
  for (const GrownTable& grown : plan.grown_tables) {
    if (absl::Status status = draft.Grow(grown); !status.ok()) return status;
  }

  std::vector<BatchSpan> spans;
  PlanDigest digest(plan.epoch, plan.step);
  uint64_t tokens = 0;
  for (const Span& span : plan.spans) {
    absl::StatusOr<BatchSpan> resolved = draft.Resolve(span);
    if (!resolved.ok()) return resolved.status();
    tokens += resolved->count;
    digest.Add(resolved->slot, resolved->begin, resolved->count, draft.table_length(resolved->slot),
               resolved->samples);
    spans.push_back(*resolved);
  }
  if (tokens > limits_.max_batched_tokens) {
    return Refuse(plan, "it computes ", tokens, " tokens; max_batched_tokens is ",
                  limits_.max_batched_tokens);
  }
  if (digest.value() != plan.digest) {
    return absl::FailedPreconditionError(
        absl::StrCat("plan of step ", plan.step, ": its digest is ", absl::Hex(plan.digest),
                     ", this worker's slots give ", absl::Hex(digest.value()),
                     ": coordinator and worker disagree about what runs"));
  }
  return spans;
}

void SlotBook::Apply(const StepPlan& plan, const std::vector<BatchSpan>& spans) {
  for (const Slot slot : plan.finished_slots) {
    for (const BlockId block : slots_[slot.value].table) --block_uses_[block.value];
    slots_[slot.value] = SlotState();
  }
  for (const NewSequence& s : plan.new_sequences) {
    slots_[s.slot.value] = {.live = true,
                            .known = static_cast<uint32_t>(s.tokens.size()),
                            .computed = s.num_computed_tokens,
                            .table = s.block_ids};
    for (const BlockId block : s.block_ids) ++block_uses_[block.value];
  }
  for (const GrownTable& grown : plan.grown_tables) {
    std::vector<BlockId>& table = slots_[grown.slot.value].table;
    table.insert(table.end(), grown.block_ids.begin(), grown.block_ids.end());
    for (const BlockId block : grown.block_ids) ++block_uses_[block.value];
  }
  for (const BatchSpan& span : spans) {
    SlotState& slot = slots_[span.slot.value];
    slot.computed += span.count;
    slot.known += span.samples ? 1 : 0;
  }
  last_step_ = plan.step;
}

}  // namespace lockstep
