// From one row of logits to one token. A pure function of the logits, the
// slot's parameters and counts, and the position: the generator is keyed by
// (seed, position), so neither batch order nor rank nor a replay changes what is
// drawn. Order: logit_bias, penalties, min_tokens mask, temperature, top_k,
// top_p, min_p. Log-probabilities are of the logits as they came.
//
// Thread-safe, apart from the scratch.
#ifndef LOCKSTEP_WORKER_SAMPLER_H_
#define LOCKSTEP_WORKER_SAMPLER_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "wire/step_plan.h"
#include "worker/backend/cpu/kernels.h"

namespace lockstep {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// In [0, 1), 53 bits.
double UniformAt(int64_t seed, uint64_t position);

// What the penalties count. Kept only for slots that have penalties.
class TokenCounts {
 public:
  void AddPrompt(TokenId token) { counts_[token].in_prompt = true; }
  void AddGenerated(TokenId token) { ++counts_[token].generated; }

  struct Count {
    uint32_t generated = 0;
    bool in_prompt = false;
  };
  const absl::flat_hash_map<TokenId, Count>& counts() const { return counts_; }

 private:
  absl::flat_hash_map<TokenId, Count> counts_;
};

bool HasPenalties(const SlotSampling& sampling);

struct Candidate {
  float value = 0.0f;
  TokenId id = 0;
};

// One thread's memory. Reused from row to row.
struct SamplerScratch {
  std::vector<float> weights;
  std::vector<Candidate> candidates;
  std::vector<float> values;
  std::vector<std::pair<TokenId, float>> changed;  // logits to put back
};

struct RowSample {
  TokenId token = 0;
  bool poisoned = false;   // NaN or infinity among the logits; nothing was drawn
  TokenLogprobs logprobs;  // when sampling.logprobs >= 0
};

// `logits` is changed during the call and restored before it returns.
// position: of the token drawn, in its sequence. num_generated: before it.
RowSample SampleRow(const cpu::Kernels& kernels, absl::Span<float> logits,
                    const SlotSampling& sampling, const TokenCounts& counts, uint64_t position,
                    uint32_t num_generated, SamplerScratch* scratch);

// The log-probability and rank of `token`, and the `top` most likely (ties to the
// lowest id). All logits finite.
TokenLogprobs ScoreRow(const cpu::Kernels& kernels, absl::Span<const float> logits, TokenId token,
                       uint32_t top, SamplerScratch* scratch);

// The k largest of `values`, largest first, ties to the lowest id.
void SelectTop(absl::Span<const float> values, size_t k, std::vector<Candidate>* out);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_SAMPLER_H_
