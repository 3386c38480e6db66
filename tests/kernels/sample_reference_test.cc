// The order and arithmetic that the kernels promise against the cpu sampler.
#include "tests/kernels/sample_reference.h"

#include <gtest/gtest.h>

#include <random>

#include "worker/sampler.h"

namespace lockstep::kernels {
namespace {

TEST(SampleMath, KeysOrderAsValuesDoAndThenByLowestId) {
  const float values[] = {
      -std::numeric_limits<float>::infinity(), -3e38f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 3e38f};
  for (size_t i = 0; i + 1 < std::size(values); ++i) {
    EXPECT_LT(TokenKey(values[i], 0), TokenKey(values[i + 1], 100000));
    EXPECT_GT(TokenKey(values[i], 4), TokenKey(values[i], 5));
    EXPECT_EQ(KeyValue(TokenKey(values[i], 7)), values[i]);
    EXPECT_EQ(KeyToken(TokenKey(values[i], 7)), 7u);
  }
  EXPECT_EQ(TokenKey(-0.0f, 3), TokenKey(0.0f, 3));
  EXPECT_LT(TokenKey(3.4e38f, 0), kPoisonedKey);
}

TEST(SampleMath, WeightsAreExponentials) {
  EXPECT_EQ(ClassWeight(0), kMaxWeight);
  EXPECT_EQ(ClassWeight(kNumClasses), 0u);
  EXPECT_EQ(ClassWeight(kNumClasses - 1), 0u);
  for (uint32_t q = 0; q < kNumClasses; q += 7) {
    const double exact =
        std::exp(-static_cast<double>(q) / 131072) * static_cast<double>(kMaxWeight);
    ASSERT_NEAR(static_cast<double>(ClassWeight(q)), exact, exact * 3e-7 + 0.51) << q;
  }
}

TEST(SampleMath, DrawsTheCpuSamplersNumbers) {
  for (int64_t seed : {int64_t{0}, int64_t{-1}, int64_t{0x123456789abcdef}}) {
    for (uint64_t position : {0, 1, 77, 131071}) {
      EXPECT_EQ(SampleUniform(seed, position), UniformAt(seed, position));
    }
  }
}

// The same tokens as the cpu sampler but for a few in a hundred thousand, of
// which u falls on a boundary.
TEST(SampleReference, DrawsTheCpuSamplersTokens) {
  std::mt19937 generator(5);
  int draws = 0, different = 0;
  for (const size_t vocab : {1, 3, 50, 1000, 20011}) {
    const int repeats = vocab > 10000 ? 40 : 400;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      std::normal_distribution<float> normal(0.0f, repeat % 3 == 0 ? 1.0f : 3.0f);
      std::vector<float> logits(vocab);
      for (float& v : logits) v = normal(generator);
      const auto pick = [&](auto... of) {
        const float values[] = {static_cast<float>(of)...};
        return values[generator() % std::size(values)];
      };
      ReferenceSlot slot;
      SlotParams& p = slot.params;
      p.temperature = pick(0, 0.5, 0.8, 1, 2);
      p.top_p = pick(1, 1, 0.3, 0.9, 0.999);
      p.top_k = static_cast<uint32_t>(pick(0, 0, 1, 5, 40, 1e5));
      p.min_p = pick(0, 0, 0.02, 0.3);
      p.repetition_penalty = pick(1, 1, 1.3, 0.8);
      p.presence_penalty = pick(0, 0, 0.7);
      p.frequency_penalty = pick(0, 0, -0.4);
      p.seed = static_cast<int64_t>(generator());
      p.num_prompt_tokens = 3;
      p.min_tokens = static_cast<int32_t>(pick(0, 4, 6));
      SlotSampling s;
      TokenCounts counts;
      const int length = 4 + static_cast<int>(generator() % 5);
      for (int i = 0; i < length; ++i) {
        slot.tokens.push_back(static_cast<int>(generator() % vocab));
        const TokenId token = static_cast<TokenId>(slot.tokens.back());
        i < 3 ? counts.AddPrompt(token) : counts.AddGenerated(token);
      }
      slot.ending_ids = {0, static_cast<int>(vocab / 2)};
      slot.bias = {{static_cast<int>(vocab) - 1, pick(-100, 2, 5)}};
      s.temperature = p.temperature;
      s.top_p = p.top_p;
      s.top_k = p.top_k;
      s.min_p = p.min_p;
      s.repetition_penalty = p.repetition_penalty;
      s.presence_penalty = p.presence_penalty;
      s.frequency_penalty = p.frequency_penalty;
      s.seed = p.seed;
      s.min_tokens = static_cast<uint32_t>(p.min_tokens);
      for (const int id : slot.ending_ids) s.ending_ids.push_back(static_cast<TokenId>(id));
      for (const auto& [id, bias] : slot.bias) {
        s.logit_bias.emplace_back(static_cast<TokenId>(id), bias);
      }
      const int token = ReferenceToken(logits, slot);
      SamplerScratch scratch;
      const RowSample cpu =
          SampleRow(cpu::BestKernels(), absl::MakeSpan(logits), s, counts, slot.tokens.size(),
                    static_cast<uint32_t>(slot.num_generated()), &scratch);
      ++draws;
      different += cpu.token != static_cast<TokenId>(token);
    }
  }
  EXPECT_LE(different, 1) << "of " << draws;
}

}  // namespace
}  // namespace lockstep::kernels
