// Plans that contradict the worker's slots are refused, and change nothing.
#include "worker/slot_book.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>

#include "wire/plan_digest.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

constexpr ExecutorLimits kLimits{.max_num_seqs = 4,
                                 .max_batched_tokens = 10,
                                 .max_model_len = 20,
                                 .block_size = 4,
                                 .num_kv_blocks = 12,
                                 .vocab_size = 50};
constexpr uint64_t kEpoch = 3;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<BlockId> Blocks(std::initializer_list<uint32_t> ids) {
  std::vector<BlockId> blocks;
  for (const uint32_t id : ids) blocks.emplace_back(id);
  return blocks;
}

NewSequence Sequence(uint32_t slot, uint32_t tokens, std::vector<BlockId> blocks) {
  NewSequence s;
  s.slot = Slot(slot);
  s.tokens.assign(tokens, 7);
  s.num_prompt_tokens = tokens;
  s.block_ids = std::move(blocks);
  return s;
}

// A coordinator that keeps its own books, to sign plans.
struct Signer {
  struct State {
    uint32_t known = 0, computed = 0, table = 0;
  };
  std::map<uint32_t, State> slots;

  StepPlan Sign(StepPlan plan) {
    for (const Slot s : plan.finished_slots) slots.erase(s.value);
    for (const NewSequence& s : plan.new_sequences) {
      slots[s.slot.value] = {static_cast<uint32_t>(s.tokens.size()), s.num_computed_tokens,
                             static_cast<uint32_t>(s.block_ids.size())};
    }
    for (const GrownTable& g : plan.grown_tables) {
      slots[g.slot.value].table += static_cast<uint32_t>(g.block_ids.size());
    }
    PlanDigest digest(plan.epoch, plan.step);
    for (const Span& span : plan.spans) {
      State& s = slots[span.slot.value];
      const bool samples = s.computed + span.num_tokens == s.known;
      digest.Add(span.slot, s.computed, span.num_tokens, s.table, samples);
      s.computed += span.num_tokens;
      s.known += samples ? 1 : 0;
    }
    plan.digest = digest.value();
    return plan;
  }
};

StepPlan Plan(uint64_t step) {
  StepPlan plan;
  plan.epoch = kEpoch;
  plan.step = step;
  return plan;
}

class SlotBookTest : public testing::Test {
 protected:
  // Slot 0: 6 tokens, 4 of them computed; blocks 0 and 1. Slot 2: 3 tokens, all
  // computed and one sampled; block 5.
  void SetUp() override {
    StepPlan plan = Plan(1);
    plan.new_sequences = {Sequence(0, 6, Blocks({0, 1})), Sequence(2, 3, Blocks({5}))};
    plan.spans = {{Slot(0), 4}, {Slot(2), 3}};
    Accept(plan);
  }

  std::vector<BatchSpan> Accept(StepPlan plan) {
    plan = signer_.Sign(plan);
    auto spans = book_.Check(plan);
    EXPECT_TRUE(spans.ok()) << spans.status();
    if (!spans.ok()) return {};
    book_.Apply(plan, *spans);
    return *spans;
  }

  // A plan that would be good but for what `spoil` does to it.
  void ExpectRefused(const std::function<void(StepPlan&)>& spoil, const std::string& why) {
    StepPlan plan = Plan(2);
    plan.spans = {{Slot(0), 2}, {Slot(2), 1}};
    spoil(plan);
    const auto spans = book_.Check(Signer(signer_).Sign(plan));
    ASSERT_FALSE(spans.ok()) << why;
    EXPECT_EQ(spans.status().code(), absl::StatusCode::kInvalidArgument) << spans.status();
    EXPECT_THAT(std::string(spans.status().message()), HasSubstr(why));
  }

  SlotBook book_{kLimits, kEpoch};
  Signer signer_;
};

TEST_F(SlotBookTest, ResolvesSpansAgainstItsState) {
  StepPlan plan = Plan(2);
  plan.spans = {{Slot(2), 1}, {Slot(0), 2}};
  const std::vector<BatchSpan> spans = Accept(plan);
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0].begin, 3u);
  EXPECT_TRUE(spans[0].samples);
  EXPECT_EQ(spans[1].begin, 4u);
  EXPECT_EQ(spans[1].count, 2u);
  EXPECT_TRUE(spans[1].samples);
}

TEST_F(SlotBookTest, AFinishedSlotCanBeTakenAgainInTheSamePlan) {
  StepPlan plan = Plan(2);
  plan.finished_slots = {Slot(2)};
  plan.new_sequences = {Sequence(2, 5, Blocks({5, 7}))};
  plan.new_sequences[0].num_computed_tokens = 4;
  plan.spans = {{Slot(2), 1}};
  EXPECT_EQ(Accept(plan)[0].begin, 4u);
}

TEST_F(SlotBookTest, EpochAndStepMustFollow) {
  ExpectRefused([](StepPlan& p) { p.epoch = 4; }, "epoch 4");
  ExpectRefused([](StepPlan& p) { p.step = 1; }, "the next step is 2");
  ExpectRefused([](StepPlan& p) { p.step = 3; }, "the next step is 2");
}

TEST_F(SlotBookTest, SlotsMustBeInRangeAndInTheRightState) {
  ExpectRefused([](StepPlan& p) { p.finished_slots = {Slot(1)}; }, "finished slot 1 is not live");
  ExpectRefused([](StepPlan& p) { p.finished_slots = {Slot(4)}; }, "finished slot 4");
  ExpectRefused([](StepPlan& p) { p.finished_slots = {Slot(~0u)}; }, "finished slot");
  ExpectRefused([](StepPlan& p) { p.finished_slots = {Slot(2), Slot(2)}; }, "not live");
  ExpectRefused([](StepPlan& p) { p.new_sequences = {Sequence(0, 1, Blocks({7}))}; }, "still live");
  ExpectRefused([](StepPlan& p) { p.new_sequences = {Sequence(4, 1, Blocks({7}))}; },
                "new slot 4 of 4");
  ExpectRefused(
      [](StepPlan& p) {
        p.new_sequences = {Sequence(1, 1, Blocks({7})), Sequence(1, 1, Blocks({8}))};
      },
      "still live");
  ExpectRefused(
      [](StepPlan& p) {
        p.grown_tables = {{Slot(1), Blocks({7})}};
      },
      "grown slot 1 is not live");
  ExpectRefused([](StepPlan& p) { p.grown_tables = {{Slot(99), Blocks({7})}}; }, "grown slot 99");
  ExpectRefused([](StepPlan& p) { p.finished_slots = {Slot(0)}; }, "slot 0 of a span is not live");
  ExpectRefused([](StepPlan& p) { p.spans.push_back({Slot(7), 1}); }, "slot 7 of a span");
  ExpectRefused([](StepPlan& p) { p.spans.push_back({Slot(2), 1}); }, "two spans");
}

TEST_F(SlotBookTest, SpansMustBeOfKnownTokensWithBlocks) {
  ExpectRefused([](StepPlan& p) { p.spans[0].num_tokens = 0; }, "compute 0 tokens");
  ExpectRefused([](StepPlan& p) { p.spans[0].num_tokens = 3; }, "2 are known");
  ExpectRefused([](StepPlan& p) { p.spans[0].num_tokens = ~0u; }, "2 are known");
  ExpectRefused(
      [](StepPlan& p) {
        p.new_sequences = {Sequence(1, 5, Blocks({7}))};
        p.spans.push_back({Slot(1), 5});
      },
      "only 1 blocks");
  ExpectRefused(
      [](StepPlan& p) {
        p.new_sequences = {Sequence(1, 11, Blocks({7, 8, 9}))};
        p.spans = {{Slot(1), 11}};
      },
      "max_batched_tokens is 10");
}

TEST_F(SlotBookTest, BlocksMustBeInRangeOnceATableAndWrittenByOne) {
  ExpectRefused([](StepPlan& p) { p.grown_tables = {{Slot(0), Blocks({12})}}; }, "block 12 of 12");
  ExpectRefused([](StepPlan& p) { p.grown_tables = {{Slot(0), Blocks({~0u})}}; }, "of 12");
  ExpectRefused([](StepPlan& p) { p.grown_tables = {{Slot(0), Blocks({1})}}; }, "block 1 twice");
  ExpectRefused(
      [](StepPlan& p) {
        p.grown_tables = {{Slot(0), Blocks({6, 7, 6})}};
      },
      "block 6 twice");
  ExpectRefused(
      [](StepPlan& p) {
        p.grown_tables = {{Slot(0), Blocks({6, 7, 8, 9})}};
      },
      "at most 5");
  ExpectRefused([](StepPlan& p) { p.new_sequences = {Sequence(1, 1, Blocks({99}))}; }, "block 99");
  ExpectRefused(
      [](StepPlan& p) {
        p.new_sequences = {Sequence(1, 2, Blocks({1}))};
        p.spans = {{Slot(1), 2}};
      },
      "block 1, which another slot holds");
  // Reading a shared block is what the prefix cache does.
  StepPlan shared = Plan(2);
  shared.new_sequences = {Sequence(1, 5, Blocks({0, 7}))};
  shared.new_sequences[0].num_computed_tokens = 4;
  shared.spans = {{Slot(1), 1}};
  Accept(shared);
}

TEST_F(SlotBookTest, NewSequencesMustMakeSense) {
  const auto spoil = [](const std::function<void(NewSequence&)>& change) {
    return [change](StepPlan& p) {
      p.new_sequences = {Sequence(1, 8, Blocks({7, 8}))};
      change(p.new_sequences[0]);
    };
  };
  ExpectRefused(spoil([](NewSequence& s) { s.tokens.clear(); }), "0 tokens");
  ExpectRefused(spoil([](NewSequence& s) { s.tokens.assign(21, 1); }), "21 tokens");
  ExpectRefused(spoil([](NewSequence& s) { s.tokens[3] = 50; }), "token 50 of a vocabulary of 50");
  ExpectRefused(spoil([](NewSequence& s) { s.num_prompt_tokens = 0; }), "0 prompt tokens");
  ExpectRefused(spoil([](NewSequence& s) { s.num_prompt_tokens = 9; }), "9 prompt tokens");
  ExpectRefused(spoil([](NewSequence& s) { s.num_computed_tokens = 8; }),
                "the last is always computed");
  ExpectRefused(spoil([](NewSequence& s) {
                  s.num_computed_tokens = 5;
                  s.block_ids.pop_back();
                }),
                "only 1 blocks");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.temperature = -1; }), "sampling.temperature");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.temperature = kNaN; }),
                "sampling.temperature");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.top_p = 0; }), "sampling.top_p");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.min_p = 2; }), "sampling.min_p");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.repetition_penalty = 0; }),
                "repetition_penalty");
  ExpectRefused(spoil([](NewSequence& s) {
                  s.sampling.repetition_penalty = std::nextafter(kMinRepetitionPenalty, 0.0f);
                }),
                "repetition_penalty");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.presence_penalty = kInf; }),
                "presence_penalty");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.frequency_penalty = kNaN; }),
                "frequency_penalty");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.logit_bias = {{50, 1.0f}}; }), "logit_bias");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.logit_bias = {{1, kInf}}; }), "logit_bias");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.ending_ids = {50}; }), "ending_ids");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.logprobs = 51; }), "logprobs");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.logprobs = -2; }), "logprobs");
  ExpectRefused(spoil([](NewSequence& s) { s.sampling.prompt_logprobs = 51; }), "prompt_logprobs");
}

TEST_F(SlotBookTest, EveryBlockThatASpanWritesIsItsSlotsAlone) {
  for (const auto& blocks : {Blocks({7, 1}), Blocks({1, 7})}) {
    ExpectRefused(
        [&](StepPlan& p) {
          p.new_sequences = {Sequence(1, 8, blocks)};
          p.spans = {{Slot(1), 8}};
        },
        "slot 1 is to write block 1, which another slot holds");
  }
}

TEST_F(SlotBookTest, AnotherDigestIsADisagreement) {
  StepPlan plan = Plan(2);
  plan.spans = {{Slot(0), 2}};
  plan = signer_.Sign(plan);
  ++plan.digest;
  const auto spans = book_.Check(plan);
  EXPECT_EQ(spans.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(spans.status().message()), HasSubstr("digest"));
  --plan.digest;
  EXPECT_TRUE(book_.Check(plan).ok());
}

TEST_F(SlotBookTest, ARefusedPlanChangesNothing) {
  StepPlan bad = Plan(2);
  bad.finished_slots = {Slot(2)};
  bad.new_sequences = {Sequence(1, 4, Blocks({8}))};
  bad.grown_tables = {{Slot(0), Blocks({9})}};
  bad.spans = {{Slot(3), 1}};
  EXPECT_FALSE(book_.Check(Signer(signer_).Sign(bad)).ok());
  // Slot 2 and its block are still there, slot 1 and blocks 8 and 9 still free.
  StepPlan good = Plan(2);
  good.new_sequences = {Sequence(1, 4, Blocks({8, 9}))};
  good.spans = {{Slot(2), 1}, {Slot(1), 4}};
  Accept(good);
}

// Random damage to good plans: refused or accepted, never a crash, and books that
// are told of accepted ones alone stay in step with the signer's.
TEST(SlotBookFuzzTest, SurvivesRandomPlans) {
  std::mt19937 random(5);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  int accepted = 0, refused = 0;
  for (int round = 0; round < 300; ++round) {
    SlotBook book(kLimits, kEpoch);
    Signer signer;
    for (int attempt = 0; attempt < 60; ++attempt) {
      StepPlan plan = Plan(book.last_step() + 1);
      if (below(3) == 0) plan.finished_slots = {Slot(below(5))};
      if (below(2) == 0) {
        NewSequence s = Sequence(below(5), 1 + below(8), {});
        for (uint32_t b = 0; b < 1 + below(3); ++b) s.block_ids.emplace_back(below(13));
        s.num_computed_tokens = below(4) == 0 ? below(9) : 0;
        plan.new_sequences = {s};
      }
      if (below(2) == 0) plan.grown_tables = {{Slot(below(5)), Blocks({below(13)})}};
      for (uint32_t i = below(4); i > 0; --i) plan.spans.push_back({Slot(below(5)), below(5)});
      Signer next = signer;
      plan = next.Sign(plan);
      const auto spans = book.Check(plan);
      if (!spans.ok()) {
        ++refused;
        continue;
      }
      book.Apply(plan, *spans);
      signer = next;
      ++accepted;
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace lockstep
