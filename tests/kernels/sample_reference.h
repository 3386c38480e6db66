// What kernels/sample.h promises, one row at a time over the whole vocabulary, by
// sorting. Plain C++: also compared with the cpu sampler, without a GPU.
#ifndef LOCKSTEP_TESTS_KERNELS_SAMPLE_REFERENCE_H_
#define LOCKSTEP_TESTS_KERNELS_SAMPLE_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/sample.h"
#include "kernels/sample_math.h"

namespace lockstep::kernels {

struct ReferenceSlot {
  SlotParams params;
  std::vector<std::pair<int, float>> bias;
  std::vector<int> ending_ids;
  std::vector<int> tokens;  // known, prompt first

  int num_generated() const { return static_cast<int>(tokens.size()) - params.num_prompt_tokens; }
};

struct ReferenceScore {
  double logprob = 0.0;
  uint32_t rank = 0;
  std::vector<std::pair<int, double>> top;
};

inline bool AllFinite(const std::vector<float>& logits) {
  return std::all_of(logits.begin(), logits.end(), [](float v) { return std::isfinite(v); });
}

inline std::vector<float> Adjusted(std::vector<float> logits, const ReferenceSlot& slot) {
  const SlotParams& p = slot.params;
  for (const auto& [id, bias] : slot.bias) logits[id] += bias;
  std::map<int, std::pair<bool, int>> seen;  // in the prompt, times generated
  for (size_t i = 0; i < slot.tokens.size(); ++i) {
    if (static_cast<int>(i) < p.num_prompt_tokens) {
      seen[slot.tokens[i]].first = true;
    } else {
      ++seen[slot.tokens[i]].second;
    }
  }
  if (p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f) {
    for (const auto& [id, count] : seen) {
      float v = logits[id];
      v = v > 0.0f ? v / p.repetition_penalty : v * p.repetition_penalty;
      if (count.second > 0) {
        const float by_count = p.frequency_penalty * static_cast<float>(count.second);
        v = v - by_count;
        v = v - p.presence_penalty;
      }
      logits[id] = v;
    }
  }
  if (slot.num_generated() < p.min_tokens) {
    for (const int id : slot.ending_ids) logits[id] = -std::numeric_limits<float>::infinity();
  }
  return logits;
}

// Ids and weights of what may be drawn, in order of id.
inline std::vector<std::pair<int, uint64_t>> Kept(const std::vector<float>& adjusted,
                                                  const SlotParams& p) {
  const float max = *std::max_element(adjusted.begin(), adjusted.end());
  const float inverse = InverseTemperature(p.temperature);
  std::vector<std::pair<uint32_t, int>> order;  // class, id
  for (size_t i = 0; i < adjusted.size(); ++i) {
    const uint32_t q = TokenClass(adjusted[i], max, inverse);
    if (ClassWeight(q) > 0) order.push_back({q, static_cast<int>(i)});
  }
  std::sort(order.begin(), order.end());
  if (p.top_k > 0 && p.top_k < order.size()) order.resize(p.top_k);
  if (p.top_p < 1.0f) {
    uint64_t total = 0, sum = 0;
    for (const auto& [q, id] : order) total += ClassWeight(q);
    const uint64_t target = NucleusMass(p.top_p, total);
    size_t count = 0;
    while (sum < target) sum += ClassWeight(order[count++].first);
    order.resize(count);
  }
  std::vector<std::pair<int, uint64_t>> kept;
  for (const auto& [q, id] : order) {
    if (ClassWeight(q) >= MinWeight(p.min_p)) kept.push_back({id, ClassWeight(q)});
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

inline int ReferenceToken(const std::vector<float>& logits, const ReferenceSlot& slot) {
  const SlotParams& p = slot.params;
  const std::vector<float> adjusted = Adjusted(logits, slot);
  const auto max = std::max_element(adjusted.begin(), adjusted.end());
  if (p.temperature == 0.0f || p.top_k == 1 || std::isinf(*max)) {
    return static_cast<int>(max - adjusted.begin());
  }
  const std::vector<std::pair<int, uint64_t>> kept = Kept(adjusted, p);
  uint64_t total = 0, sum = 0;
  for (const auto& [id, weight] : kept) total += weight;
  const uint64_t target = DrawTarget(SampleUniform(p.seed, slot.tokens.size()), total);
  for (const auto& [id, weight] : kept) {
    sum += weight;
    if (sum > target) return id;
  }
  return -1;
}

inline ReferenceScore ReferenceScores(const std::vector<float>& logits, int token, int top) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float v : logits) sum += std::exp(v - max);
  const double log_sum = max + std::log(sum);
  ReferenceScore score;
  score.logprob = logits[token] - log_sum;
  score.rank = 1;
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int a, int b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  for (const int id : order) score.rank += before(id, token);
  const size_t count = std::min(order.size(), static_cast<size_t>(top));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    before);
  for (size_t i = 0; i < count; ++i) score.top.push_back({order[i], logits[order[i]] - log_sum});
  return score;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_SAMPLE_REFERENCE_H_
