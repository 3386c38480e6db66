// A model for tests: the next token is a function of every known token and the
// seed, so that a lost, doubled or misplaced token anywhere changes all that
// follows. Executes plans as a worker would and keeps a pretend KV cache in
// which each position remembers the prefix it was computed from: a block that
// was reused too early, or shared wrongly, is noticed when it is read.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_SLOTS_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_SLOTS_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "wire/plan_digest.h"
#include "wire/step_plan.h"

namespace lockstep {

inline constexpr uint32_t kFakeVocab = 1'000;
inline constexpr uint32_t kFakeCollectives = 5;

inline uint64_t MixToken(uint64_t hash, uint64_t value) {
  return (hash ^ (value + 1)) * 0x100000001b3u + (hash >> 29);
}

// Never below 10, which leaves ids for ending tokens that do not come by themselves.
inline TokenId FakeNextToken(const std::vector<TokenId>& known, int64_t seed) {
  uint64_t hash = 0xcbf29ce484222325u ^ static_cast<uint64_t>(seed);
  for (const TokenId token : known) hash = MixToken(hash, token);
  return 10 + static_cast<TokenId>((hash >> 17) % (kFakeVocab - 10));
}

// What a request with this prompt and seed generates.
inline std::vector<TokenId> FakeAnswer(std::vector<TokenId> prompt, int64_t seed, size_t n) {
  std::vector<TokenId> answer;
  for (size_t i = 0; i < n; ++i) {
    answer.push_back(FakeNextToken(prompt, seed));
    prompt.push_back(answer.back());
  }
  return answer;
}

class FakeSlots {
 public:
  explicit FakeSlots(uint32_t block_size) : block_size_(block_size) {}

  // What was wrong with a plan or the KV it relied on; empty: nothing yet.
  const std::string& complaint() const { return complaint_; }

  StepResult Run(const StepPlan& plan) {
    if (plan.step != last_step_ + 1) Complain("step ", plan.step, " after ", last_step_);
    last_step_ = plan.step;
    for (const Slot slot : plan.finished_slots) {
      if (slots_.erase(slot) == 0) Complain("finished slot ", slot.value, " was not running");
    }
    for (const NewSequence& sequence : plan.new_sequences) {
      if (slots_.contains(sequence.slot)) Complain("slot ", sequence.slot.value, " is taken");
      slots_[sequence.slot] = {sequence.tokens, sequence.num_computed_tokens, sequence.block_ids,
                               sequence.sampling.seed};
    }
    for (const GrownTable& grown : plan.grown_tables) {
      auto& blocks = slots_[grown.slot].blocks;
      blocks.insert(blocks.end(), grown.block_ids.begin(), grown.block_ids.end());
    }
    StepResult result;
    result.epoch = plan.epoch;
    result.step = plan.step;
    result.num_collectives = kFakeCollectives;
    PlanDigest digest(plan.epoch, plan.step);
    for (const Span& span : plan.spans) {
      if (!slots_.contains(span.slot)) {
        Complain("span of slot ", span.slot.value, ", which is not running");
        continue;
      }
      State& state = slots_[span.slot];
      const bool samples = state.computed + span.num_tokens == state.known.size();
      digest.Add(span.slot, state.computed, span.num_tokens,
                 static_cast<uint32_t>(state.blocks.size()), samples);
      Compute(span, state);
      if (!samples) continue;
      SampledToken sampled;
      sampled.slot = span.slot;
      sampled.token = FakeNextToken(state.known, state.seed);
      state.known.push_back(sampled.token);
      result.sampled.push_back(sampled);
    }
    result.digest = digest.value();
    return result;
  }

 private:
  struct State {
    std::vector<TokenId> known;
    uint32_t computed = 0;
    std::vector<BlockId> blocks;
    int64_t seed = 0;
  };

  template <typename... Parts>
  void Complain(const Parts&... parts) {
    if (complaint_.empty()) complaint_ = absl::StrCat(parts...);
  }

  void Compute(const Span& span, State& state) {
    const uint32_t end = state.computed + span.num_tokens;
    if (end > state.known.size() || end > state.blocks.size() * block_size_) {
      return Complain("slot ", span.slot.value, ": span to ", end, " of ", state.known.size(),
                      " tokens in ", state.blocks.size(), " blocks");
    }
    uint64_t prefix = 7;
    for (uint32_t position = 0; position < end; ++position) {
      prefix = MixToken(prefix, state.known[position]);
      uint64_t& entry = kv_[{state.blocks[position / block_size_], position % block_size_}];
      if (position >= state.computed) {
        entry = prefix;
      } else if (entry != prefix) {
        return Complain("slot ", span.slot.value, ": the KV of position ", position,
                        " is another sequence's");
      }
    }
    state.computed = end;
  }

  const uint32_t block_size_;
  uint64_t last_step_ = 0;
  std::map<Slot, State> slots_;
  std::map<std::pair<BlockId, uint32_t>, uint64_t> kv_;
  std::string complaint_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_SLOTS_H_
