#include "worker/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace lockstep {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

bool Before(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value > b.value : a.id < b.id;
}

void Change(absl::Span<float> logits, TokenId id, float value, SamplerScratch* scratch) {
  scratch->changed.emplace_back(id, logits[id]);
  logits[id] = value;
}

// What changes single logits; everything after it looks at the whole row.
void ChangeLogits(absl::Span<float> logits, const SlotSampling& s, const TokenCounts& counts,
                  uint32_t num_generated, SamplerScratch* scratch) {
  for (const auto& [id, bias] : s.logit_bias) Change(logits, id, logits[id] + bias, scratch);
  if (HasPenalties(s)) {
    for (const auto& [id, count] : counts.counts()) {
      float logit = logits[id];
      logit = logit > 0.0f ? logit / s.repetition_penalty : logit * s.repetition_penalty;
      if (count.generated > 0) {
        logit -= s.frequency_penalty * static_cast<float>(count.generated);
        logit -= s.presence_penalty;
      }
      Change(logits, id, logit, scratch);
    }
  }
  if (num_generated < s.min_tokens) {
    for (const TokenId id : s.ending_ids) Change(logits, id, kMinusInfinity, scratch);
  }
}

void RestoreLogits(absl::Span<float> logits, SamplerScratch* scratch) {
  for (auto it = scratch->changed.rbegin(); it != scratch->changed.rend(); ++it) {
    logits[it->first] = it->second;
  }
  scratch->changed.clear();
}

TokenId Greedy(absl::Span<const float> logits, float max) {
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), max) - logits.begin());
}

// The nucleus of weights in [0, 1]: the largest weights, ties to the lowest id,
// until they hold `share` of `total`. Returns its last member. Weights are first
// dealt into buckets by exponent and three bits of mantissa, so that only the
// bucket where the share is reached needs sorting.
Candidate LastOfNucleus(absl::Span<const float> weights, double total, double share,
                        std::vector<Candidate>* candidates) {
  constexpr int kShift = 20;
  constexpr size_t kBuckets = (uint32_t{0x3f800000} >> kShift) + 1;
  std::array<double, kBuckets> mass{};
  const auto bucket = [](float w) {
    return std::min<size_t>(std::bit_cast<uint32_t>(w) >> kShift, kBuckets - 1);
  };
  for (const float w : weights) mass[bucket(w)] += w;

  const double target = share * total;
  double above = 0.0;
  size_t b = kBuckets - 1;
  while (b > 0 && above + mass[b] < target) above += mass[b--];

  candidates->clear();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (bucket(weights[i]) == b) candidates->push_back({weights[i], static_cast<TokenId>(i)});
  }
  if (candidates->empty()) return {0.0f, static_cast<TokenId>(weights.size())};
  std::sort(candidates->begin(), candidates->end(), Before);
  for (const Candidate& c : *candidates) {
    above += c.value;
    if (above >= target) return c;
  }
  return candidates->back();
}

// The candidates are in order of id and at least one has weight: the first whose
// running sum passes u of the total.
TokenId Draw(absl::Span<const Candidate> candidates, double u) {
  double total = 0.0;
  for (const Candidate& c : candidates) total += c.value;
  const double target = u * total;
  double sum = 0.0;
  TokenId last = candidates.front().id;
  for (const Candidate& c : candidates) {
    if (c.value <= 0.0f) continue;
    sum += c.value;
    last = c.id;
    if (sum > target) break;
  }
  return last;
}

// A row cut to its top k: few enough candidates to sort.
void KeepTopK(const cpu::Kernels& kernels, absl::Span<const float> logits, float max,
              const SlotSampling& s, SamplerScratch* scratch) {
  std::vector<Candidate>& candidates = scratch->candidates;
  SelectTop(logits, s.top_k, &candidates);
  std::vector<float>& weights = scratch->values;
  weights.clear();
  for (const Candidate& c : candidates) weights.push_back((c.value - max) / s.temperature);
  const int64_t count = static_cast<int64_t>(weights.size());
  const double total = kernels.exp_sum(weights.data(), 0.0f, count, weights.data());

  size_t kept = 0;
  double sum = 0.0;
  while (kept < candidates.size()) {
    if (weights[kept] < s.min_p) break;  // the largest weight is 1
    candidates[kept].value = weights[kept];
    sum += weights[kept++];
    if (s.top_p < 1.0f && sum >= s.top_p * total) break;
  }
  candidates.resize(kept);
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
}

void KeepFromWholeRow(const cpu::Kernels& kernels, absl::Span<const float> logits, float max,
                      const SlotSampling& s, SamplerScratch* scratch) {
  std::vector<float>& weights = scratch->weights;
  weights.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) weights[i] = (logits[i] - max) / s.temperature;
  const int64_t count = static_cast<int64_t>(weights.size());
  const double total = kernels.exp_sum(weights.data(), 0.0f, count, weights.data());

  Candidate last{0.0f, static_cast<TokenId>(logits.size())};
  if (s.top_p < 1.0f) last = LastOfNucleus(weights, total, s.top_p, &scratch->candidates);
  scratch->candidates.clear();
  for (size_t i = 0; i < weights.size(); ++i) {
    const Candidate c{weights[i], static_cast<TokenId>(i)};
    if (c.value > 0.0f && c.value >= s.min_p && !Before(last, c)) scratch->candidates.push_back(c);
  }
}

}  // namespace

std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

double UniformAt(int64_t seed, uint64_t position) {
  const uint64_t s = static_cast<uint64_t>(seed);
  const std::array<uint32_t, 4> words =
      Philox({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0},
             {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)});
  const uint64_t bits = (uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

bool HasPenalties(const SlotSampling& s) {
  return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
}

void SelectTop(absl::Span<const float> values, size_t k, std::vector<Candidate>* out) {
  // `out` holds the top k of what was read, and at most as many again that have
  // yet to be cut. A later value equal to the k-th loses to it by its id.
  out->clear();
  k = std::min(k, values.size());
  if (k == 0) return;
  const size_t limit = 2 * k + 64;
  bool cut = false;
  float kth = 0.0f;
  for (size_t i = 0; i < values.size(); ++i) {
    if (cut && !(values[i] > kth)) continue;
    out->push_back({values[i], static_cast<TokenId>(i)});
    if (out->size() == limit) {
      std::nth_element(out->begin(), out->begin() + (k - 1), out->end(), Before);
      out->resize(k);
      kth = out->back().value;
      cut = true;
    }
  }
  if (out->size() > k) {
    std::nth_element(out->begin(), out->begin() + (k - 1), out->end(), Before);
    out->resize(k);
  }
  std::sort(out->begin(), out->end(), Before);
}

TokenLogprobs ScoreRow(const cpu::Kernels& kernels, absl::Span<const float> logits, TokenId token,
                       uint32_t top, SamplerScratch* scratch) {
  LOCKSTEP_CHECK(token < logits.size());
  const int64_t count = static_cast<int64_t>(logits.size());
  const float max = kernels.max(logits.data(), count);
  scratch->weights.resize(logits.size());
  const double sum = kernels.exp_sum(logits.data(), max, count, scratch->weights.data());
  const double log_sum = static_cast<double>(max) + std::log(sum);
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - log_sum);
  };

  TokenLogprobs result;
  result.logprob = logprob(logits[token]);
  uint32_t before = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    before += logits[i] > logits[token] || (logits[i] == logits[token] && i < token);
  }
  result.rank = before + 1;
  SelectTop(logits, top, &scratch->candidates);
  for (const Candidate& c : scratch->candidates) result.top.emplace_back(c.id, logprob(c.value));
  return result;
}

RowSample SampleRow(const cpu::Kernels& kernels, absl::Span<float> logits, const SlotSampling& s,
                    const TokenCounts& counts, uint64_t position, uint32_t num_generated,
                    SamplerScratch* scratch) {
  RowSample result;
  const int64_t count = static_cast<int64_t>(logits.size());
  if (!kernels.all_finite(logits.data(), count)) {
    result.poisoned = true;
    return result;
  }
  ChangeLogits(logits, s, counts, num_generated, scratch);
  const float max = kernels.max(logits.data(), count);
  if (s.temperature == 0.0f || s.top_k == 1 || max == kMinusInfinity) {
    result.token = Greedy(logits, max);
  } else {
    if (s.top_k > 0 && s.top_k < logits.size()) {
      KeepTopK(kernels, logits, max, s, scratch);
    } else {
      KeepFromWholeRow(kernels, logits, max, s, scratch);
    }
    result.token = Draw(scratch->candidates, UniformAt(s.seed, position));
  }
  RestoreLogits(logits, scratch);
  if (s.logprobs >= 0) {
    result.logprobs =
        ScoreRow(kernels, logits, result.token, static_cast<uint32_t>(s.logprobs), scratch);
  }
  return result;
}

}  // namespace lockstep
