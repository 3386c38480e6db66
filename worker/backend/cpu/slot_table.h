// What the cpu backend keeps of each slot: its tokens, its blocks, how it
// samples. The executor has checked every id before it comes here.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_SLOT_TABLE_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_SLOT_TABLE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/check.h"
#include "wire/step_plan.h"
#include "worker/sampler.h"

namespace lockstep::cpu {

struct SlotState {
  bool live = false;
  std::vector<TokenId> tokens;  // known
  uint32_t num_prompt_tokens = 0;
  std::vector<uint32_t> table;  // block ids
  SlotSampling sampling;
  TokenCounts counts;     // empty without penalties
  bool poisoned = false;  // once its logits were not finite: it samples no more

  uint32_t num_generated() const {
    return static_cast<uint32_t>(tokens.size()) - num_prompt_tokens;
  }

  void AppendGenerated(TokenId token) {
    tokens.push_back(token);
    if (HasPenalties(sampling)) counts.AddGenerated(token);
  }
};

// A token of the step being computed.
struct StepRow {
  SlotState* slot = nullptr;
  int64_t position = 0;
};

class SlotTable {
 public:
  explicit SlotTable(uint32_t slots) : slots_(slots) {}

  SlotState& At(Slot slot) {
    LOCKSTEP_CHECK(slot.value < slots_.size() && slots_[slot.value].live);
    return slots_[slot.value];
  }

  void Admit(const NewSequence& s) {
    LOCKSTEP_CHECK(s.slot.value < slots_.size() && !slots_[s.slot.value].live);
    SlotState& state = slots_[s.slot.value];
    state = {.live = true,
             .tokens = s.tokens,
             .num_prompt_tokens = s.num_prompt_tokens,
             .table = {},
             .sampling = s.sampling,
             .counts = {},
             .poisoned = false};
    Grow(s.slot, s.block_ids);
    if (!HasPenalties(s.sampling)) return;
    for (size_t i = 0; i < s.tokens.size(); ++i) {
      if (i < s.num_prompt_tokens) {
        state.counts.AddPrompt(s.tokens[i]);
      } else {
        state.counts.AddGenerated(s.tokens[i]);
      }
    }
  }

  void Grow(Slot slot, absl::Span<const BlockId> blocks) {
    for (const BlockId block : blocks) At(slot).table.push_back(block.value);
  }

  void Release(Slot slot) { At(slot) = SlotState(); }

  void Clear() { slots_.assign(slots_.size(), SlotState()); }

 private:
  std::vector<SlotState> slots_;
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_SLOT_TABLE_H_
