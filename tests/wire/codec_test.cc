#include "wire/codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace lockstep::wire {
namespace {

using ::testing::StartsWith;

// Builds random values within what the protocol allows.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }
  float Real(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_);
  }
  template <typename T>
  std::vector<T> Many(uint32_t at_most, const std::function<T()>& one) {
    std::vector<T> result;
    for (uint32_t n = Below(at_most + 1); n > 0; --n) result.push_back(one());
    return result;
  }

  SlotSampling Sampling() {
    SlotSampling s;
    s.temperature = Real(0, 2);
    s.top_p = Real(0.01f, 1);
    s.top_k = Below(100);
    s.min_p = Real(0, 1);
    s.repetition_penalty = Real(0.01f, 2);
    s.presence_penalty = Real(-2, 2);
    s.frequency_penalty = Real(-2, 2);
    s.seed = static_cast<int64_t>(random_());
    s.logit_bias = Many<std::pair<TokenId, float>>(
        5, [&] { return std::pair<TokenId, float>(Below(1 << 20), Real(-100, 100)); });
    s.min_tokens = Below(10);
    s.ending_ids = Many<TokenId>(4, [&] { return Below(1 << 20); });
    s.logprobs = static_cast<int32_t>(Below(22)) - 1;
    s.prompt_logprobs = static_cast<int32_t>(Below(22)) - 1;
    return s;
  }

  NewSequence Sequence() {
    NewSequence s;
    s.slot = Slot(Below(512));
    s.tokens = Many<TokenId>(60, [&] { return Below(1 << 20); });
    s.tokens.push_back(Below(100));
    const uint32_t count = static_cast<uint32_t>(s.tokens.size());
    s.num_prompt_tokens = 1 + Below(count);
    s.num_computed_tokens = Below(count);
    s.block_ids = Many<BlockId>(9, [&] { return BlockId(Below(1 << 24)); });
    s.sampling = Sampling();
    return s;
  }

  StepPlan Plan() {
    StepPlan p;
    p.epoch = 1 + random_() % 1000;
    p.step = 1 + random_();
    p.digest = random_();
    p.finished_slots = Many<Slot>(5, [&] { return Slot(Below(512)); });
    p.new_sequences = Many<NewSequence>(4, [&] { return Sequence(); });
    p.grown_tables = Many<GrownTable>(6, [&] {
      GrownTable grown{Slot(Below(512)), {BlockId(Below(1000))}};
      while (Below(3) == 0) grown.block_ids.push_back(BlockId(Below(1000)));
      return grown;
    });
    const bool one_each = Below(2) == 0;
    p.spans = Many<Span>(40, [&] { return Span{Slot(Below(512)), one_each ? 1 : 1 + Below(300)}; });
    return p;
  }

  TokenLogprobs Logprobs() {
    TokenLogprobs l;
    l.logprob = Below(20) == 0 ? -std::numeric_limits<float>::infinity() : Real(-30, 0);
    l.rank = 1 + Below(1 << 20);
    l.top = Many<std::pair<TokenId, float>>(
        20, [&] { return std::pair<TokenId, float>(Below(1 << 20), Real(-30, 0)); });
    return l;
  }

  StepResult Result() {
    StepResult r;
    r.epoch = 1 + Below(100);
    r.step = 1 + random_();
    r.digest = random_();
    r.num_collectives = Below(200);
    r.timing = {random_(), random_(), random_(), random_(), random_(),
                random_(), random_(), random_(), random_()};
    uint32_t slot = 0;
    r.sampled = Many<SampledToken>(30, [&] {
      SampledToken s;
      s.slot = Slot(slot++);
      s.token = Below(1 << 20);
      s.poisoned = Below(5) == 0;
      s.has_logprobs = !s.poisoned && Below(2) == 0;
      if (s.has_logprobs) s.logprobs = Logprobs();
      return s;
    });
    r.prompt_logprobs = Many<SlotPromptLogprobs>(3, [&] {
      return SlotPromptLogprobs{Slot(Below(512)), Below(1000),
                                Many<TokenLogprobs>(10, [&] { return Logprobs(); })};
    });
    return r;
  }

 private:
  std::mt19937_64 random_;
};

template <typename Message, typename Value>
Value ThroughBytes(const Value& value) {
  Message message;
  EXPECT_TRUE(message.ParseFromString(Encode(value).SerializeAsString()));
  absl::StatusOr<Value> decoded = Decode(message);
  EXPECT_TRUE(decoded.ok()) << decoded.status();
  return decoded.ok() ? *decoded : Value{};
}

TEST(Codec, PlansSurviveTheWire) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const StepPlan plan = Draw(seed).Plan();
    ASSERT_EQ((ThroughBytes<worker::v1::StepPlan>(plan)), plan) << "seed " << seed;
  }
}

TEST(Codec, ResultsSurviveTheWire) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const StepResult result = Draw(seed).Result();
    ASSERT_EQ((ThroughBytes<worker::v1::StepResult>(result)), result) << "seed " << seed;
  }
}

StepPlan SteadyDecode(uint32_t sequences, uint32_t growths) {
  StepPlan plan;
  plan.epoch = 3;
  plan.step = 123'456;
  plan.digest = 0x0123456789abcdef;
  for (uint32_t i = 0; i < sequences; ++i) plan.spans.push_back({Slot(i), 1});
  for (uint32_t i = 0; i < growths; ++i) {
    plan.grown_tables.push_back({Slot(i * sequences / growths), {BlockId(500'000 + i * 77)}});
  }
  return plan;
}

TEST(Codec, SteadyDecodeOf256SequencesIsUnderOneKilobyte) {
  const worker::v1::StepPlan message = Encode(SteadyDecode(256, 16));
  EXPECT_EQ(message.span_tokens_size(), 0);
  std::printf("plan bytes of a steady 256-sequence decode with 16 block growths: %zu\n",
              message.ByteSizeLong());
  EXPECT_LE(message.ByteSizeLong(), 1024u);
}

TEST(Codec, EqualPlansAreEqualBytes) {
  const StepPlan plan = Draw(5).Plan();
  EXPECT_EQ(Encode(plan).SerializeAsString(), Encode(StepPlan(plan)).SerializeAsString());
}

worker::v1::StepPlan ValidPlan() {
  StepPlan plan = SteadyDecode(4, 2);
  NewSequence sequence = Draw(1).Sequence();
  sequence.sampling.logit_bias = {{3, 1.0f}};
  plan.new_sequences = {sequence};
  plan.spans[0].num_tokens = 5;
  return Encode(plan);
}

struct Hostile {
  const char* field;  // how the message must begin
  std::function<void(worker::v1::StepPlan&)> spoil;
};

TEST(Codec, RefusesHostilePlansByField) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto sampling = [](worker::v1::StepPlan& p) {
    return p.mutable_new_sequences(0)->mutable_sampling();
  };
  const std::vector<Hostile> cases = {
      {"epoch", [](auto& p) { p.set_epoch(0); }},
      {"step", [](auto& p) { p.set_step(0); }},
      {"finished_slots",
       [](auto& p) {
         for (int i = 0; i < 70'000; ++i) p.add_finished_slots(i);
       }},
      {"new_sequences",
       [](auto& p) {
         for (int i = 0; i < 70'000; ++i) p.add_new_sequences();
       }},
      {"new_sequences[1].tokens", [](auto& p) { p.add_new_sequences(); }},
      {"new_sequences[0].num_prompt_tokens",
       [](auto& p) { p.mutable_new_sequences(0)->set_num_prompt_tokens(0); }},
      {"new_sequences[0].num_prompt_tokens",
       [](auto& p) { p.mutable_new_sequences(0)->set_num_prompt_tokens(4'000'000'000u); }},
      {"new_sequences[0].num_computed_tokens",
       [](auto& p) {
         p.mutable_new_sequences(0)->set_num_computed_tokens(p.new_sequences(0).tokens_size());
       }},
      {"new_sequences[0].sampling.temperature",
       [&](auto& p) { sampling(p)->set_temperature(nan); }},
      {"new_sequences[0].sampling.temperature", [&](auto& p) { sampling(p)->set_temperature(-1); }},
      {"new_sequences[0].sampling.top_p", [&](auto& p) { sampling(p)->set_top_p(0); }},
      {"new_sequences[0].sampling.top_p", [&](auto& p) { sampling(p)->set_top_p(INFINITY); }},
      {"new_sequences[0].sampling.min_p", [&](auto& p) { sampling(p)->set_min_p(1.5f); }},
      {"new_sequences[0].sampling.repetition_penalty",
       [&](auto& p) { sampling(p)->set_repetition_penalty(0); }},
      {"new_sequences[0].sampling.presence_penalty",
       [&](auto& p) { sampling(p)->set_presence_penalty(-INFINITY); }},
      {"new_sequences[0].sampling.frequency_penalty",
       [&](auto& p) { sampling(p)->set_frequency_penalty(nan); }},
      {"new_sequences[0].sampling.bias_values", [&](auto& p) { sampling(p)->add_bias_ids(4); }},
      {"new_sequences[0].sampling.bias_values",
       [&](auto& p) { sampling(p)->set_bias_values(0, nan); }},
      {"new_sequences[0].sampling.bias_ids",
       [&](auto& p) {
         for (int i = 0; i < 1025; ++i) {
           sampling(p)->add_bias_ids(i);
           sampling(p)->add_bias_values(1);
         }
       }},
      {"new_sequences[0].sampling.ending_ids",
       [&](auto& p) {
         for (int i = 0; i < 1025; ++i) sampling(p)->add_ending_ids(i);
       }},
      {"new_sequences[0].sampling.logprobs", [&](auto& p) { sampling(p)->set_logprobs(21); }},
      {"new_sequences[0].sampling.prompt_logprobs",
       [&](auto& p) { sampling(p)->set_prompt_logprobs(-2); }},
      {"grown_counts", [](auto& p) { p.add_grown_slots(1); }},
      {"grown_counts[0]", [](auto& p) { p.set_grown_counts(0, 0); }},
      {"grown_blocks", [](auto& p) { p.set_grown_counts(1, 2); }},
      {"grown_blocks", [](auto& p) { p.set_grown_counts(1, 0xffffffffu); }},
      {"grown_blocks", [](auto& p) { p.add_grown_blocks(1); }},
      {"span_slots",
       [](auto& p) {
         for (int i = 0; i < 70'000; ++i) p.add_span_slots(i);
       }},
      {"span_tokens", [](auto& p) { p.add_span_tokens(1); }},
      {"span_tokens[1]", [](auto& p) { p.set_span_tokens(1, 0); }},
      {"span_tokens", [](auto& p) { p.set_span_tokens(1, 0xffffffffu); }},
  };
  ASSERT_TRUE(Decode(ValidPlan()).ok());
  for (const Hostile& hostile : cases) {
    worker::v1::StepPlan plan = ValidPlan();
    hostile.spoil(plan);
    const absl::StatusOr<StepPlan> decoded = Decode(plan);
    ASSERT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument) << hostile.field;
    EXPECT_THAT(std::string(decoded.status().message()),
                StartsWith(std::string(hostile.field) + ": "));
  }
}

TEST(Codec, RefusesHostileResultsByField) {
  StepResult valid;
  valid.epoch = 1;
  valid.step = 1;
  valid.sampled.resize(3);
  for (uint32_t i = 0; i < 3; ++i) {
    valid.sampled[i].slot = Slot(i);
    valid.sampled[i].has_logprobs = true;
    valid.sampled[i].logprobs = {-1.0f, 1, {{4, -2.0f}}};
  }
  valid.prompt_logprobs = {{Slot(1), 0, {{-1.0f, 1, {{4, -2.0f}}}}}};
  ASSERT_TRUE(Decode(Encode(valid)).ok());
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::pair<const char*, std::function<void(worker::v1::StepResult&)>>> cases = {
      {"epoch", [](auto& r) { r.set_epoch(0); }},
      {"step", [](auto& r) { r.set_step(0); }},
      {"sampled_tokens", [](auto& r) { r.add_sampled_tokens(1); }},
      {"sampled_tokens", [](auto& r) { r.add_sampled_slots(1); }},
      {"logprobs", [](auto& r) { r.add_logprobs(); }},
      {"logprobs[1].top_logprobs", [](auto& r) { r.mutable_logprobs(1)->add_top_ids(1); }},
      {"logprobs[1].top_ids",
       [](auto& r) {
         for (int i = 0; i < 21; ++i) {
           r.mutable_logprobs(1)->add_top_ids(1);
           r.mutable_logprobs(1)->add_top_logprobs(-1);
         }
       }},
      {"logprobs[2].logprob", [&](auto& r) { r.mutable_logprobs(2)->set_logprob(nan); }},
      {"logprobs[2].top_logprobs",
       [&](auto& r) { r.mutable_logprobs(2)->set_top_logprobs(0, nan); }},
      {"poisoned_slots", [](auto& r) { r.add_poisoned_slots(9); }},
      {"poisoned_slots",
       [](auto& r) {
         r.add_poisoned_slots(1);
         r.add_poisoned_slots(1);
       }},
      {"prompt_logprobs[0].entries[0].top_logprobs",
       [](auto& r) { r.mutable_prompt_logprobs(0)->mutable_entries(0)->add_top_ids(1); }},
  };
  for (const auto& [field, spoil] : cases) {
    worker::v1::StepResult result = Encode(valid);
    spoil(result);
    const absl::StatusOr<StepResult> decoded = Decode(result);
    ASSERT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(decoded.status().message()), StartsWith(std::string(field) + ": "));
  }
}

// Bytes that nobody encoded: most do not parse, none may crash, and what does
// decode must encode again to the same value.
TEST(Codec, SurvivesMutatedBytes) {
  std::mt19937 random(42);
  int decoded_plans = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = i % 2 == 0 ? Encode(Draw(i).Plan()).SerializeAsString()
                                   : Encode(Draw(i).Result()).SerializeAsString();
    for (uint32_t n = 1 + random() % 4; n > 0 && !bytes.empty(); --n) {
      switch (random() % 3) {
        case 0:
          bytes[random() % bytes.size()] = static_cast<char>(random());
          break;
        case 1:
          bytes.resize(random() % bytes.size());
          break;
        default:
          bytes.insert(random() % bytes.size(), 1 + random() % 9, static_cast<char>(random()));
      }
    }
    worker::v1::StepPlan plan;
    if (plan.ParseFromString(bytes)) {
      if (const absl::StatusOr<StepPlan> value = Decode(plan); value.ok()) {
        ++decoded_plans;
        EXPECT_EQ((ThroughBytes<worker::v1::StepPlan>(*value)), *value);
      }
    }
    worker::v1::StepResult result;
    if (result.ParseFromString(bytes)) (void)Decode(result);
  }
  EXPECT_GT(decoded_plans, 100);  // the mutations reach past the parser
}

}  // namespace
}  // namespace lockstep::wire
