#include "worker/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::Pair;

const cpu::Kernels& K() { return cpu::BestKernels(); }

std::vector<float> RandomLogits(size_t n, uint32_t seed, float spread = 3.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(n);
  for (float& l : logits) l = normal(generator);
  return logits;
}

RowSample Sample(std::vector<float> logits, const SlotSampling& s, uint64_t position = 0,
                 const TokenCounts& counts = {}, uint32_t num_generated = 0) {
  SamplerScratch scratch;
  const std::vector<float> before = logits;
  RowSample sample =
      SampleRow(K(), absl::MakeSpan(logits), s, counts, position, num_generated, &scratch);
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  EXPECT_TRUE(std::equal(before.begin(), before.end(), logits.begin(), same))
      << "logits not restored";
  return sample;
}

SlotSampling Greedy() {
  SlotSampling s;
  s.temperature = 0.0f;
  return s;
}

// The order of operations written out over sorted copies, in double precision:
// each token's probability.
std::vector<double> NaiveProbabilities(std::vector<double> logits, const SlotSampling& s,
                                       const TokenCounts& counts, uint32_t num_generated) {
  for (const auto& [id, bias] : s.logit_bias) logits[id] += bias;
  for (const auto& [id, count] : counts.counts()) {
    if (!count.in_prompt && count.generated == 0) continue;
    logits[id] =
        logits[id] > 0 ? logits[id] / s.repetition_penalty : logits[id] * s.repetition_penalty;
    logits[id] -= double{s.frequency_penalty} * count.generated;
    if (count.generated > 0) logits[id] -= s.presence_penalty;
  }
  if (num_generated < s.min_tokens) {
    for (const TokenId id : s.ending_ids) logits[id] = -std::numeric_limits<double>::infinity();
  }
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(logits.size(), 0.0);
  if (s.temperature == 0.0f) {
    p[order[0]] = 1.0;
    return p;
  }
  const size_t k = s.top_k == 0 ? order.size() : std::min<size_t>(s.top_k, order.size());
  double total = 0.0;
  for (size_t i = 0; i < k; ++i) {
    p[order[i]] = std::exp((logits[order[i]] - logits[order[0]]) / s.temperature);
    total += p[order[i]];
  }
  double sum = 0.0;
  for (size_t i = 0; i < k; ++i) {
    const bool past_nucleus = s.top_p < 1.0f && sum >= s.top_p * total;
    sum += p[order[i]];
    if (past_nucleus || p[order[i]] < s.min_p) p[order[i]] = 0.0;
  }
  const double kept = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= kept;
  return p;
}

std::vector<double> ToDouble(const std::vector<float>& x) { return {x.begin(), x.end()}; }

TEST(PhiloxTest, KnownAnswers) {  // of the authors' Random123 library
  EXPECT_THAT(Philox({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  EXPECT_THAT(Philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(PhiloxTest, UniformsDependOnSeedAndPosition) {
  std::set<double> seen;
  double sum = 0.0;
  for (int64_t seed = -20; seed < 20; ++seed) {
    for (uint64_t position = 0; position < 50; ++position) {
      const double u = UniformAt(seed, position);
      EXPECT_GE(u, 0.0);
      EXPECT_LT(u, 1.0);
      EXPECT_EQ(u, UniformAt(seed, position));
      sum += u;
      seen.insert(u);
    }
  }
  EXPECT_EQ(seen.size(), 2000u);
  EXPECT_NEAR(sum / 2000, 0.5, 0.02);
}

TEST(PhiloxTest, UniformsDependOnEveryBitOfSeedAndPosition) {
  std::set<double> seen = {UniformAt(1, 0)};
  for (int bit = 1; bit < 64; ++bit) {
    const uint64_t high = uint64_t{1} << bit;
    EXPECT_TRUE(seen.insert(UniformAt(static_cast<int64_t>(1 + high), 0)).second) << bit;
    EXPECT_TRUE(seen.insert(UniformAt(1, high)).second) << bit;
  }
}

TEST(SamplerTest, TemperatureZeroTakesTheLargestAndTheLowestOfEquals) {
  EXPECT_EQ(Sample({1, 5, 2, 5, 0}, Greedy()).token, 1u);
  EXPECT_EQ(Sample({-3}, Greedy()).token, 0u);
  std::vector<float> logits = RandomLogits(5000, 3);
  logits[4321] = 100.0f;
  EXPECT_EQ(Sample(logits, Greedy()).token, 4321u);
}

TEST(SamplerTest, TopKOfOneIsGreedy) {
  SlotSampling s;
  s.top_k = 1;
  for (uint64_t position = 0; position < 20; ++position) {
    EXPECT_EQ(Sample({1, 5, 2, 5, 0}, s, position).token, 1u);
  }
}

TEST(SamplerTest, BiasPenaltiesAndMaskActInOrder) {
  SlotSampling s = Greedy();
  s.logit_bias = {{2, 10.0f}};
  EXPECT_EQ(Sample({1, 5, 2, 5, 0}, s).token, 2u);
  // 12 / 4 = 3 after the bias; token 1 stays at 5.
  s.repetition_penalty = 4.0f;
  TokenCounts counts;
  counts.AddPrompt(2);
  EXPECT_EQ(Sample({1, 5, 2, 5, 0}, s, 0, counts).token, 1u);
  // Negative logits are multiplied.
  SlotSampling r = Greedy();
  r.repetition_penalty = 2.0f;
  TokenCounts first;
  first.AddPrompt(0);
  EXPECT_EQ(Sample({-1.0f, -1.5f}, r, 0, first).token, 1u);
  // Presence and frequency count what was generated, not the prompt.
  SlotSampling f = Greedy();
  f.frequency_penalty = 0.4f;
  f.presence_penalty = 0.3f;
  TokenCounts generated;
  generated.AddPrompt(1);
  EXPECT_EQ(Sample({0, 1.0f, 0.05f}, f, 0, generated).token, 1u);
  generated.AddGenerated(1);
  EXPECT_EQ(Sample({0, 1.0f, 0.05f}, f, 0, generated).token, 1u);  // 0.3
  generated.AddGenerated(1);
  EXPECT_EQ(Sample({0, 1.0f, 0.05f}, f, 0, generated).token, 2u);  // -0.1
  // The mask comes last: no bias revives an ending token.
  SlotSampling m = Greedy();
  m.min_tokens = 3;
  m.ending_ids = {1};
  m.logit_bias = {{1, 100.0f}};
  EXPECT_EQ(Sample({1, 5, 2}, m, 0, {}, 2).token, 2u);
  EXPECT_EQ(Sample({1, 5, 2}, m, 0, {}, 3).token, 1u);
}

TEST(SamplerTest, EveryTokenMaskedStillAnswers) {
  SlotSampling s;
  s.min_tokens = 1;
  s.ending_ids = {0, 1};
  EXPECT_EQ(Sample({1, 2}, s).token, 0u);
}

TEST(SamplerTest, LogitsThatAreNotFinitePoisonTheRow) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    std::vector<float> logits = RandomLogits(100, 1);
    logits[77] = bad;
    EXPECT_TRUE(Sample(logits, Greedy()).poisoned);
    EXPECT_TRUE(Sample(logits, SlotSampling()).poisoned);
  }
  EXPECT_FALSE(Sample(RandomLogits(100, 1), SlotSampling()).poisoned);
}

// Draws many tokens and tests them against the naive probabilities: nothing that
// has none is ever drawn, and the chi-square statistic of the rest stays below
// its mean plus five standard deviations.
void ExpectFollows(const std::vector<float>& logits, const SlotSampling& s,
                   const TokenCounts& counts = {}, uint32_t num_generated = 0) {
  const std::vector<double> p = NaiveProbabilities(ToDouble(logits), s, counts, num_generated);
  constexpr int kDraws = 8000;
  std::vector<int> drawn(logits.size(), 0);
  std::vector<float> row = logits;
  SamplerScratch scratch;
  for (uint64_t i = 0; i < kDraws; ++i) {
    ++drawn[SampleRow(K(), absl::MakeSpan(row), s, counts, i, num_generated, &scratch).token];
  }
  double chi2 = 0.0, rest_expected = 0.0, rest_drawn = 0.0;
  int cells = 0;
  const auto add = [&](double seen, double expected) {
    chi2 += (seen - expected) * (seen - expected) / expected;
    ++cells;
  };
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0.0) {
      EXPECT_EQ(drawn[i], 0) << "token " << i;
    } else if (p[i] * kDraws >= 10) {
      add(drawn[i], p[i] * kDraws);
    } else {
      rest_expected += p[i] * kDraws;
      rest_drawn += drawn[i];
    }
  }
  if (rest_expected >= 1) add(rest_drawn, rest_expected);
  const double freedom = std::max(1, cells - 1);
  EXPECT_LT(chi2, freedom + 5 * std::sqrt(2 * freedom)) << cells << " cells";
}

TEST(SamplerTest, DrawsFollowTheDistribution) {
  const std::vector<float> logits = RandomLogits(200, 5, 1.5f);
  SlotSampling s;
  s.seed = 42;
  ExpectFollows(logits, s);
  s.temperature = 0.5f;
  ExpectFollows(logits, s);
  s.temperature = 1.8f;
  s.top_k = 20;
  ExpectFollows(logits, s);
  s.top_p = 0.7f;
  ExpectFollows(logits, s);
  s.top_k = 0;
  ExpectFollows(logits, s);
  s.top_p = 1.0f;
  s.min_p = 0.2f;
  ExpectFollows(logits, s);
  s = SlotSampling();
  s.logit_bias = {{3, 4.0f}, {5, -100.0f}};
  s.repetition_penalty = 1.3f;
  s.presence_penalty = 0.5f;
  s.frequency_penalty = 0.2f;
  s.min_tokens = 4;
  s.ending_ids = {3, 9};
  s.top_p = 0.9f;
  s.min_p = 0.01f;
  TokenCounts counts;
  for (const TokenId id : {1, 2, 3, 7}) counts.AddPrompt(id);
  for (const TokenId id : {2, 2, 7, 11}) counts.AddGenerated(id);
  ExpectFollows(logits, s, counts, 3);
  ExpectFollows(logits, s, counts, 4);
}

TEST(SamplerTest, TheNucleusIsTheNaiveOne) {
  // Which tokens can be drawn, over many shapes of rows and shares.
  for (const float spread : {0.0f, 0.01f, 1.0f, 8.0f}) {
    for (const size_t vocab : {1u, 2u, 50u, 3000u}) {
      for (const float top_p : {1e-6f, 0.1f, 0.5f, 0.9f, 0.999f}) {
        for (const uint32_t top_k : {0u, 3u, 40u}) {
          const std::vector<float> logits = RandomLogits(vocab, 9, spread);
          SlotSampling s;
          s.top_p = top_p;
          s.top_k = top_k;
          s.temperature = 0.8f;
          const std::vector<double> p = NaiveProbabilities(ToDouble(logits), s, {}, 0);
          for (uint64_t position = 0; position < 20; ++position) {
            const TokenId token = Sample(logits, s, position).token;
            ASSERT_LT(token, vocab);
            if (p[token] > 0) continue;
            // Float and double may part at the border; never far from it.
            SlotSampling wider = s;
            wider.top_p = top_p * 1.0001f + 1e-6f;
            ASSERT_GT(NaiveProbabilities(ToDouble(logits), wider, {}, 0)[token], 0.0)
                << "vocab " << vocab << " p " << top_p << " k " << top_k;
          }
        }
      }
    }
  }
}

TEST(SamplerTest, ADrawIsAFunctionOfSeedAndPosition) {
  const std::vector<float> logits = RandomLogits(1000, 8);
  SlotSampling s;
  s.seed = -7;
  std::set<TokenId> tokens;
  for (uint64_t position = 0; position < 40; ++position) {
    const TokenId token = Sample(logits, s, position).token;
    EXPECT_EQ(token, Sample(logits, s, position).token);
    tokens.insert(token);
  }
  EXPECT_GT(tokens.size(), 5u);
}

TEST(SamplerTest, ExtremeTemperaturesStayDefined) {
  const std::vector<float> logits = {1.0f, 3e38f, -3e38f, 2.0f};
  SlotSampling s;
  s.temperature = 1e-30f;
  EXPECT_EQ(Sample(logits, s).token, 1u);
  s.temperature = 2.0f;
  EXPECT_EQ(Sample(logits, s).token, 1u);
}

TEST(SamplerTest, SelectsTheTopInOrderTiesToTheLowestId) {
  std::mt19937 generator(4);
  for (const size_t n : {1u, 5u, 64u, 1000u, 20000u}) {
    for (const size_t k : {0u, 1u, 5u, 20u, 1024u}) {
      std::vector<float> values(n);
      for (float& v : values) v = static_cast<float>(generator() % 50);  // many ties
      std::vector<TokenId> order(n);
      std::iota(order.begin(), order.end(), 0u);
      std::stable_sort(order.begin(), order.end(),
                       [&](TokenId a, TokenId b) { return values[a] > values[b]; });
      order.resize(std::min(n, k));
      std::vector<Candidate> top;
      SelectTop(values, k, &top);
      ASSERT_EQ(top.size(), order.size());
      for (size_t i = 0; i < order.size(); ++i)
        ASSERT_EQ(top[i].id, order[i]) << n << " " << k << " " << i;
    }
  }
}

TEST(SamplerTest, LogprobsAreOfTheRawDistribution) {
  SlotSampling s = Greedy();
  s.logprobs = 2;
  s.logit_bias = {{0, 50.0f}};
  const std::vector<float> logits = {0.0f, std::log(2.0f), std::log(5.0f), std::log(2.0f)};
  const RowSample sample = Sample(logits, s);
  EXPECT_EQ(sample.token, 0u);
  EXPECT_NEAR(sample.logprobs.logprob, std::log(0.1), 1e-6);
  EXPECT_EQ(sample.logprobs.rank, 4u);
  EXPECT_THAT(sample.logprobs.top,
              ElementsAre(Pair(2u, testing::FloatNear(std::log(0.5f), 1e-6f)),
                          Pair(1u, testing::FloatNear(std::log(0.2f), 1e-6f))));
  SamplerScratch scratch;
  EXPECT_EQ(ScoreRow(K(), logits, 1, 0, &scratch).rank, 2u);
  EXPECT_EQ(ScoreRow(K(), logits, 3, 0, &scratch).rank, 3u);
  EXPECT_THAT(ScoreRow(K(), logits, 3, 0, &scratch).top, testing::IsEmpty());
}

TEST(SamplerTest, LogprobsMatchDoublePrecisionOverALargeVocabulary) {
  const std::vector<float> logits = RandomLogits(128256, 12);
  double sum = 0.0;
  for (const float l : logits) sum += std::exp(double{l});
  SamplerScratch scratch;
  for (const TokenId token : {0u, 77u, 128255u}) {
    EXPECT_NEAR(ScoreRow(K(), logits, token, 3, &scratch).logprob, logits[token] - std::log(sum),
                1e-5);
  }
}

}  // namespace
}  // namespace lockstep
