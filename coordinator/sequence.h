// The scheduler's own records: a request while it lives and its n sequences.
// Private to coordinator/scheduler*.cc.
//
//            (leader's prompt acknowledged)        (blocks and a slot)
//   kHeldBack -----------------------> kWaiting <----------------------> kRunning
//                                          |    (preempted, group died)     |
//                                          +------------> kEnded <----------+
//
// Counting, for a running sequence (all in token positions):
//
//   0 ...... num_acknowledged ...... num_computed ...... num_known
//   KV acknowledged        KV in plans in flight    to be computed
//
// num_known counts tokens that were sampled or are being sampled in flight;
// the values of the last `num_in_flight` of them are still on the device.
#ifndef LOCKSTEP_COORDINATOR_SEQUENCE_H_
#define LOCKSTEP_COORDINATOR_SEQUENCE_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <span>
#include <tuple>
#include <vector>

#include "common/ids.h"
#include "coordinator/kv/block_table.h"
#include "coordinator/request.h"
#include "wire/step_plan.h"

namespace lockstep {

struct LiveRequest;

enum class SequenceState { kHeldBack, kWaiting, kRunning, kEnded };

struct Sequence {
  LiveRequest* request = nullptr;
  uint32_t index = 0;  // in [0, n)
  SequenceState state = SequenceState::kHeldBack;
  std::vector<TokenId> generated;  // delivered tokens
  bool resumed = false;            // it ran before: waits in front of all that did not
  uint32_t num_preemptions = 0;
  // A suspect of its group's death until this many positions are acknowledged;
  // 0: it is none.
  uint32_t clear_at = 0;

  // Of the current run; meaningless while not running.
  Slot slot;
  uint64_t run = 0;  // names this stay in the slot; never used twice
  BlockTable table;
  uint32_t num_computed = 0;
  uint32_t num_acknowledged = 0;
  uint32_t num_in_flight = 0;    // tokens being sampled
  bool prompt_logprobs = false;  // asked for in this run
  uint64_t last_step = 0;        // the last plan it is in (also kept after a preemption)
  uint32_t reached = 0;          // the most positions ever planned in this epoch (kept likewise)
  // Prefix cache: the first num_cached blocks of the table are entries. Once
  // another block stands for the same content, the chain ends here.
  uint32_t num_cached = 0;
  uint32_t num_found = 0;  // of those, there before it started: not its own
  bool chain_open = false;

  inline uint32_t num_prompt() const;
  inline uint32_t num_known() const;
  inline uint32_t num_to_compute() const { return num_known() - num_computed; }
  // Whether its last token is being sampled: it needs no further step.
  inline bool IsDraining() const;
  inline uint32_t MaxNewTokens() const;
  // Blocks it holds at most in its life.
  inline uint32_t MaxBlocks(uint32_t block_size) const;
  // Tokens [first, first + count), all of known value; `scratch` holds them
  // when they do not lie in one piece.
  inline std::span<const TokenId> Tokens(uint32_t first, uint32_t count,
                                         std::vector<TokenId>* scratch) const;
};

struct LiveRequest {
  Request request;
  uint64_t arrival = 0;            // order of Add
  std::deque<Sequence> sequences;  // n of them; addresses are stable
  uint32_t num_live = 0;           // sequences not ended
  uint32_t num_running = 0;        // sequences with a slot
  uint32_t num_held_back = 0;      // sequences behind their leader
  bool started = false;
  uint32_t next_prompt_logprob =
      1;               // first prompt position not yet delivered; the first token has none
  int num_deaths = 0;  // group deaths it was part of and that nobody else explains
};

// Who gets blocks and budget first among running sequences; the last one is
// preempted first.
struct SeniorFirst {
  static auto Key(const Sequence* s) {
    return std::make_tuple(s->request->request.priority, s->request->arrival, s->index);
  }
  bool operator()(const Sequence* a, const Sequence* b) const { return Key(a) < Key(b); }
};

// Who is admitted first: what ran before, then by priority and arrival.
struct AdmittedFirst {
  bool operator()(const Sequence* a, const Sequence* b) const {
    if (a->resumed != b->resumed) return a->resumed;
    return SeniorFirst()(a, b);
  }
};

// Of sequence `index` of a request: the request's own for the first. Neighbouring
// requests' seeds do not meet: the step between indices is a large odd number,
// and the sum is mixed (the finaliser of splitmix64).
inline int64_t SequenceSeed(int64_t seed, uint32_t index) {
  if (index == 0) return seed;
  uint64_t z = static_cast<uint64_t>(seed) + index * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<int64_t>(z ^ (z >> 31));
}

uint32_t Sequence::num_prompt() const {
  return static_cast<uint32_t>(request->request.prompt.size());
}

uint32_t Sequence::num_known() const {
  return num_prompt() + static_cast<uint32_t>(generated.size()) + num_in_flight;
}

// Scoring a prompt samples one token all the same; it is dropped.
uint32_t Sequence::MaxNewTokens() const {
  return std::max(1u, request->request.sampling.max_tokens);
}

bool Sequence::IsDraining() const { return num_known() >= num_prompt() + MaxNewTokens(); }

// The last token's KV is never needed.
uint32_t Sequence::MaxBlocks(uint32_t block_size) const {
  return BlocksForTokens(uint64_t{num_prompt()} + MaxNewTokens() - 1, block_size);
}

std::span<const TokenId> Sequence::Tokens(uint32_t first, uint32_t count,
                                          std::vector<TokenId>* scratch) const {
  const std::vector<TokenId>& prompt = request->request.prompt;
  if (first + count <= prompt.size()) return {prompt.data() + first, count};
  if (first >= prompt.size()) return {generated.data() + (first - prompt.size()), count};
  scratch->assign(prompt.begin() + first, prompt.end());
  scratch->insert(scratch->end(), generated.begin(),
                  generated.begin() + (first + count - prompt.size()));
  return *scratch;
}

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_SEQUENCE_H_
