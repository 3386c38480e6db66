// Batches for the tests of sampling: rows of every setting over logits of every kind.
#ifndef LOCKSTEP_TESTS_KERNELS_SAMPLE_BATCH_H_
#define LOCKSTEP_TESTS_KERNELS_SAMPLE_BATCH_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/kernels/sample_rig.h"

namespace lockstep::kernels {

using Logits = std::vector<std::vector<float>>;

enum class Kind { kNormal, kCoarse, kEqual, kPeaked, kHuge, kZeros };
constexpr Kind kKinds[] = {Kind::kNormal, Kind::kCoarse, Kind::kEqual,
                           Kind::kPeaked, Kind::kHuge,   Kind::kZeros};

inline std::vector<float> MakeLogits(Kind kind, int vocab, std::mt19937& generator) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(vocab);
  for (float& v : logits) {
    v = normal(generator);
    if (kind == Kind::kCoarse) v = std::round(v * 4.0f) / 4.0f;  // many ties
    if (kind == Kind::kEqual) v = 1.5f;
    if (kind == Kind::kHuge) v *= 1e37f;
    if (kind == Kind::kZeros) v = generator() % 2 == 0 ? 0.0f : -0.0f;
  }
  if (kind == Kind::kPeaked) logits[generator() % vocab] += 25.0f;
  return logits;
}

struct Setting {
  const char* name;
  std::function<void(ReferenceSlot*, int vocab, std::mt19937&)> set;
};

inline const std::vector<Setting>& Settings() {
  static const std::vector<Setting> settings = {
      {"greedy", [](ReferenceSlot* s, int, std::mt19937&) { s->params.temperature = 0.0f; }},
      {"temperature", [](ReferenceSlot*, int, std::mt19937&) {}},
      {"cold", [](ReferenceSlot* s, int, std::mt19937&) { s->params.temperature = 0.05f; }},
      {"frozen", [](ReferenceSlot* s, int, std::mt19937&) { s->params.temperature = 1e-38f; }},
      {"top_p", [](ReferenceSlot* s, int, std::mt19937&) { s->params.top_p = 0.9f; }},
      {"hot top_p",
       [](ReferenceSlot* s, int, std::mt19937&) {
         s->params.temperature = 2.0f;
         s->params.top_p = 0.999f;
       }},
      {"tiny top_p", [](ReferenceSlot* s, int, std::mt19937&) { s->params.top_p = 1e-6f; }},
      {"top_k 1", [](ReferenceSlot* s, int, std::mt19937&) { s->params.top_k = 1; }},
      {"top_k 2", [](ReferenceSlot* s, int, std::mt19937&) { s->params.top_k = 2; }},
      {"top_k 50", [](ReferenceSlot* s, int, std::mt19937&) { s->params.top_k = 50; }},
      {"top_k of most",
       [](ReferenceSlot* s, int vocab, std::mt19937&) {
         s->params.temperature = 1.5f;
         s->params.top_k = static_cast<uint32_t>(std::max(1, vocab - 5));
       }},
      {"top_k of all", [](ReferenceSlot* s, int vocab,
                          std::mt19937&) { s->params.top_k = static_cast<uint32_t>(vocab); }},
      {"nested",
       [](ReferenceSlot* s, int, std::mt19937&) {
         s->params.top_k = 40;
         s->params.top_p = 0.8f;
       }},
      {"wide nested",
       [](ReferenceSlot* s, int vocab, std::mt19937&) {
         s->params.temperature = 1.3f;
         s->params.top_k = static_cast<uint32_t>(vocab / 3 + 1);
         s->params.top_p = 0.95f;
         s->params.min_p = 1e-4f;
       }},
      {"min_p", [](ReferenceSlot* s, int, std::mt19937&) { s->params.min_p = 0.05f; }},
      {"min_p 1", [](ReferenceSlot* s, int, std::mt19937&) { s->params.min_p = 1.0f; }},
      {"penalties",
       [](ReferenceSlot* s, int, std::mt19937&) {
         s->params.repetition_penalty = 1.4f;
         s->params.presence_penalty = 0.6f;
         s->params.frequency_penalty = -0.3f;
       }},
      {"greedy penalties",
       [](ReferenceSlot* s, int, std::mt19937&) {
         s->params.temperature = 0.0f;
         s->params.repetition_penalty = 0.7f;
         s->params.frequency_penalty = 1.9f;
       }},
      {"bias",
       [](ReferenceSlot* s, int vocab, std::mt19937& generator) {
         std::set<int> ids;
         for (int i = 0; i < 40; ++i) ids.insert(static_cast<int>(generator() % vocab));
         for (const int id : ids) s->bias.push_back({id, static_cast<float>(id % 13) - 4.0f});
       }},
      {"min_tokens",
       [](ReferenceSlot* s, int vocab, std::mt19937& generator) {
         s->params.min_tokens = 100;
         for (int i = 0; i < 70; ++i)
           s->ending_ids.push_back(static_cast<int>(generator() % vocab));
       }},
      {"min_tokens reached",
       [](ReferenceSlot* s, int vocab, std::mt19937&) {
         s->params.min_tokens = 1;
         for (int i = 0; i < std::min(vocab, 200); ++i) s->ending_ids.push_back(i);
       }},
      {"everything",
       [](ReferenceSlot* s, int vocab, std::mt19937& generator) {
         s->params.temperature = 0.8f;
         s->params.top_k = 500;
         s->params.top_p = 0.97f;
         s->params.min_p = 0.001f;
         s->params.repetition_penalty = 1.1f;
         s->params.presence_penalty = 0.2f;
         s->params.frequency_penalty = 0.1f;
         s->params.min_tokens = 50;
         s->ending_ids = {static_cast<int>(generator() % vocab)};
         s->bias = {{static_cast<int>(generator() % vocab), 3.0f}};
       }},
  };
  return settings;
}

inline ReferenceSlot MakeSlot(int setting, int vocab, std::mt19937& generator) {
  ReferenceSlot slot;
  slot.params.temperature = 1.0f;
  slot.params.seed = static_cast<int64_t>(generator()) * 77777 - 5;
  slot.params.num_prompt_tokens = 1 + static_cast<int>(generator() % 5);
  const int length = slot.params.num_prompt_tokens + static_cast<int>(generator() % 20);
  // Few distinct ids, so that counts go beyond one.
  const uint32_t distinct = std::min(vocab, 9);
  for (int i = 0; i < length; ++i) {
    slot.tokens.push_back(static_cast<int>(generator() % distinct * (vocab / distinct)));
  }
  Settings()[setting].set(&slot, vocab, generator);
  return slot;
}

struct Batch {
  std::vector<ReferenceSlot> slots;
  std::vector<RigRow> rows;
  Logits logits;
  std::vector<int> settings;
};

inline Batch MakeBatch(int vocab, int rows, uint32_t seed, int only = -1) {
  std::mt19937 generator(seed);
  Batch b;
  for (int i = 0; i < rows; ++i) {
    const int setting = only >= 0 ? only : static_cast<int>((seed + i) % Settings().size());
    b.settings.push_back(setting);
    b.slots.push_back(MakeSlot(setting, vocab, generator));
    b.rows.push_back({rows - 1 - i});  // slots in another order than rows
    b.logits.push_back(MakeLogits(kKinds[(seed + i / 2) % std::size(kKinds)], vocab, generator));
  }
  if (rows > 3) b.rows[2].slot = -1;
  return b;
}

inline void ExpectTokens(const SampleRig& rig, const Batch& b, const std::string& what) {
  rig.Check(what);
  const std::vector<SampledRow> results = rig.Results();
  for (size_t i = 0; i < b.rows.size(); ++i) {
    if (b.rows[i].slot < 0) continue;
    const ReferenceSlot& slot = b.slots[b.rows[i].slot];
    const std::string where =
        what + ", row " + std::to_string(i) + ", " + Settings()[b.settings[b.rows[i].slot]].name;
    ASSERT_EQ(results[i].token, ReferenceToken(b.logits[i], slot)) << where;
    ASSERT_EQ(results[i].flags & kSampledPoisoned, 0u) << where;
    ASSERT_EQ(rig.Token(b.rows[i].slot, static_cast<int>(slot.tokens.size())), results[i].token)
        << where;
  }
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_SAMPLE_BATCH_H_
