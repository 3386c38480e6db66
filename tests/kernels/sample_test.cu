// Sampling over virtual ranks against a reference that sorts whole rows: tokens
// are compared exactly, under any tp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/sample.h"
#include "tests/kernels/sample_batch.h"

namespace lockstep::kernels {
namespace {

struct Shape {
  int vocab, rows, tp;
};

std::vector<Shape> Shapes() {
  if (SanitizerRun()) return {{37, 6, 2}, {4097, 24, 1}, {9001, 5, 4}};
  return {{1, 3, 1},       {1, 2, 4},       {2, 5, 2},      {37, 24, 1},    {37, 24, 8},
          {1000, 48, 1},   {1000, 48, 2},   {1000, 48, 4},  {1000, 48, 8},  {4096, 17, 1},
          {4097, 17, 1},   {8191, 24, 2},   {32000, 64, 1}, {32000, 64, 4}, {50257, 24, 2},
          {128256, 24, 4}, {151937, 24, 1}, {151937, 1, 8}};
}

TEST(Sample, DrawsTheReferencesTokens) {
  for (const Shape& shape : Shapes()) {
    const int repeats = shape.vocab > 5000 || SanitizerRun() ? 1 : 4;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const Batch b = MakeBatch(shape.vocab, shape.rows, 100 * shape.rows + repeat);
      RigOptions options;
      options.tp = shape.tp;
      options.stride_excess = repeat % 4;
      options.pdl = repeat % 2 == 1;
      SampleRig rig(b.slots, b.rows, b.logits, options);
      rig.Run();
      ExpectTokens(rig, b,
                   "vocabulary " + std::to_string(shape.vocab) + ", " + std::to_string(shape.rows) +
                       " rows, tp " + std::to_string(shape.tp) + ", repeat " +
                       std::to_string(repeat));
      if (HasFatalFailure()) return;
    }
  }
}

// Each setting alone, so that the batch needs no more phases than it does.
TEST(Sample, NeedsOnlyThePhasesItsRowsAskFor) {
  const int vocab = SanitizerRun() ? 301 : 5001;
  for (int setting = 0; setting < static_cast<int>(Settings().size()); ++setting) {
    for (const int tp : {1, 2}) {
      const Batch b = MakeBatch(vocab, 7, 31 * setting + tp, setting);
      RigOptions options;
      options.tp = tp;
      SampleRig rig(b.slots, b.rows, b.logits, options);
      rig.Run();
      ExpectTokens(rig, b, std::string(Settings()[setting].name) + ", tp " + std::to_string(tp));
      if (HasFatalFailure()) return;
    }
  }
}

// Pairs of settings: the phases that two kinds of rows need together, among them
// rows without a cut where only histograms tell the mass.
TEST(Sample, SettingsShareABatch) {
  const int vocab = SanitizerRun() ? 301 : 9001, count = static_cast<int>(Settings().size());
  for (int first = 0; first < count; first += SanitizerRun() ? 4 : 1) {
    for (int second = first + 1; second < count; second += SanitizerRun() ? 5 : 1) {
      Batch b = MakeBatch(vocab, 4, 1000 + 31 * first + second, first);
      std::mt19937 generator(first + 100 * second);
      for (const int slot : {0, 2}) {
        b.slots[slot] = MakeSlot(second, vocab, generator);
        b.settings[slot] = second;
      }
      RigOptions options;
      options.tp = 1 + 2 * (second % 2);
      SampleRig rig(b.slots, b.rows, b.logits, options);
      rig.Run();
      ExpectTokens(rig, b, std::string(Settings()[first].name) + " and " + Settings()[second].name);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Sample, GreedyRowsOfALargeBatch) {
  const int vocab = SanitizerRun() ? 2003 : 65003, rows = SanitizerRun() ? 9 : 256;
  const Batch b = MakeBatch(vocab, rows, 3, 0);
  for (const int tp : {1, 8}) {
    RigOptions options;
    options.tp = tp;
    SampleRig rig(b.slots, b.rows, b.logits, options);
    ASSERT_FALSE(HasPhase(rig.needs(), kChoose));
    for (int run = 0; run < 2; ++run) {  // the keys are ready for a second batch
      rig.Run();
      ExpectTokens(rig, b, "tp " + std::to_string(tp) + ", run " + std::to_string(run));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Sample, MasksEverythingToTheLowestId) {
  Batch b = MakeBatch(200, 2, 9, 1);
  for (ReferenceSlot& slot : b.slots) {
    slot.params.min_tokens = 1000;
    for (int i = 0; i < 200; ++i) slot.ending_ids.push_back(i);
  }
  RigOptions options;
  options.tp = 4;
  SampleRig rig(b.slots, b.rows, b.logits, options);
  rig.Run();
  ExpectTokens(rig, b, "all masked");
  EXPECT_EQ(rig.Results()[0].token, 0);
}

TEST(Sample, PoisonsRowsThatAreNotFinite) {
  const int vocab = 9001;
  for (const int setting : {0, 1, 12, 16, 21}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (const int tp : {1, 4}) {
        Batch b = MakeBatch(vocab, 8, 17, setting);
        b.logits[0][0] = bad;
        b.logits[4][vocab - 1] = bad;
        b.logits[5][vocab / 2 + 1] = bad;
        RigOptions options;
        options.tp = tp;
        SampleRig rig(b.slots, b.rows, b.logits, options);
        rig.Run();
        rig.Check("poisoned");
        const std::vector<SampledRow> results = rig.Results();
        for (int i = 0; i < 8; ++i) {
          if (b.rows[i].slot < 0) continue;
          const bool poisoned = i == 0 || i == 4 || i == 5;
          ASSERT_EQ(results[i].flags & kSampledPoisoned, poisoned ? kSampledPoisoned : 0u)
              << "row " << i << ", value " << bad;
          const int expected = poisoned ? 0 : ReferenceToken(b.logits[i], b.slots[b.rows[i].slot]);
          ASSERT_EQ(results[i].token, expected) << "row " << i << ", value " << bad;
          ASSERT_EQ(rig.Poisoned(b.rows[i].slot), poisoned);
        }
      }
    }
    if (SanitizerRun()) return;
  }
}

// A slot that was poisoned stays so, also where this step's logits are fine.
TEST(Sample, PoisonedSlotsSampleNoMore) {
  for (const int setting : {0, 4}) {
    Batch b = MakeBatch(100, 3, 21, setting);
    RigOptions options;
    options.tp = 2;
    SampleRig rig(b.slots, b.rows, b.logits, options);
    const uint32_t one = 1;
    for (int r = 0; r < 2; ++r) {
      ASSERT_CUDA(cudaMemcpy(rig.args(r).poisoned + b.rows[1].slot, &one, sizeof(one),
                             cudaMemcpyHostToDevice));
    }
    rig.Run();
    rig.Check("poisoned before");
    const std::vector<SampledRow> results = rig.Results();
    EXPECT_EQ(results[0].flags, 0u);
    EXPECT_EQ(results[1].flags, kSampledPoisoned);
    EXPECT_EQ(results[2].flags, 0u);
  }
}

void ExpectScore(const RowLogprobs& got, const ReferenceScore& expected, const std::string& what) {
  const auto near = [&](float a, double b) {
    ASSERT_NEAR(a, b, 2e-6 * std::abs(b) + 2e-6) << what;
  };
  near(got.logprob, expected.logprob);
  ASSERT_EQ(got.rank, expected.rank) << what;
  ASSERT_EQ(got.num_top, expected.top.size()) << what;
  for (size_t i = 0; i < expected.top.size(); ++i) {
    ASSERT_EQ(got.top_id[i], expected.top[i].first) << what << ", alternative " << i;
    near(got.top_logprob[i], expected.top[i].second);
  }
}

// Of sampled tokens, which may be drawn from changed logits, and of prompt tokens.
TEST(Sample, ScoresTheRawDistribution) {
  std::vector<Shape> shapes = {{1, 2, 1}, {5, 9, 2}, {1000, 44, 4}, {4100, 30, 1}, {128256, 12, 2}};
  if (SanitizerRun()) shapes = {{5, 9, 2}, {4100, 12, 1}};
  for (const Shape& shape : shapes) {
    Batch b = MakeBatch(shape.vocab, shape.rows, 1000 + shape.vocab);
    for (int i = 0; i < shape.rows; ++i) {
      SlotParams& p = b.slots[i].params;
      p.logprobs = i % 5 == 0 ? -1 : (i * 7) % 21;
      p.prompt_logprobs = (i * 3) % 21;
      // A row in four scores a prompt token, which another row may well sample after.
      if (i % 4 == 3 && b.rows[i].slot >= 0) {
        ReferenceSlot& slot = b.slots[b.rows[i].slot];
        while (slot.tokens.size() < 3) slot.tokens.push_back(shape.vocab - 1);
        b.rows[i].score_position = static_cast<int>(slot.tokens.size()) - 2;
      }
    }
    RigOptions options;
    options.tp = shape.tp;
    SampleRig rig(b.slots, b.rows, b.logits, options);
    rig.Run();
    rig.Check("scores");
    for (int r = 0; r < shape.tp; ++r) {
      const std::vector<SampledRow> results = rig.Results(r);
      const std::vector<RowLogprobs> scores = rig.Logprobs(r);
      for (int i = 0; i < shape.rows; ++i) {
        if (b.rows[i].slot < 0) continue;
        const ReferenceSlot& slot = b.slots[b.rows[i].slot];
        const bool scored = b.rows[i].score_position >= 0;
        const std::string what = "vocabulary " + std::to_string(shape.vocab) + ", row " +
                                 std::to_string(i) + ", rank " + std::to_string(r);
        const int token =
            scored ? slot.tokens[b.rows[i].score_position + 1] : ReferenceToken(b.logits[i], slot);
        ASSERT_EQ(results[i].token, token) << what;
        const int top = scored ? slot.params.prompt_logprobs : slot.params.logprobs;
        ASSERT_EQ(results[i].flags, top >= 0 ? kSampledLogprobs : 0u) << what;
        if (top < 0) {
          ASSERT_TRUE(DeviceRows<RowLogprobs>::Untouched(scores[i])) << what;
          continue;
        }
        ExpectScore(scores[i], ReferenceScores(b.logits[i], token, top), what);
        if (HasFatalFailure()) return;
        if (scored) ASSERT_EQ(rig.Token(b.rows[i].slot, static_cast<int>(slot.tokens.size())), -1);
      }
    }
  }
}

TEST(Sample, CountsTokensOfThePromptAndSampledOnes) {
  const int vocab = 501;
  for (const int tp : {1, 4}) {
    Batch b = MakeBatch(vocab, 6, 55, 16);
    RigOptions options;
    options.tp = tp;
    SampleRig rig(b.slots, b.rows, b.logits, options);
    for (int run = 0; run < 2; ++run) {
      for (int i = 0; i < 6; ++i) {
        const int s = b.rows[i].slot;
        if (s < 0) continue;
        std::vector<uint16_t> expected(vocab, 0);
        const ReferenceSlot& slot = b.slots[s];
        for (size_t t = 0; t < slot.tokens.size(); ++t) {
          uint16_t& count = expected[slot.tokens[t]];
          count = static_cast<int>(t) < slot.params.num_prompt_tokens
                      ? static_cast<uint16_t>(count | 0x8000)
                      : static_cast<uint16_t>(count + 1);
        }
        ASSERT_EQ(rig.Counts(s), expected) << "slot " << s << ", run " << run;
      }
      if (run == 1) break;
      rig.Run();
      ExpectTokens(rig, b, "counts");
      for (int i = 0; i < 6; ++i) {
        if (b.rows[i].slot >= 0) {
          b.slots[b.rows[i].slot].tokens.push_back(rig.Results()[i].token);
        }
      }
    }
  }
}

// The last position that the table holds is behind: nothing beyond it is written.
TEST(Sample, DoesNotStoreATokenBeyondTheTable) {
  Batch b = MakeBatch(64, 1, 5, 0);
  RigOptions options;
  options.tokens_stride = static_cast<int>(b.slots[0].tokens.size());
  SampleRig rig(b.slots, b.rows, b.logits, options);
  rig.Run();
  rig.Check("full table");
  EXPECT_EQ(rig.Results()[0].token, ReferenceToken(b.logits[0], b.slots[0]));
}

// Frequencies of many positions' draws against probabilities in double.
TEST(Sample, DrawsByProbability) {
  const int vocab = 40, rows = 64, batches = SanitizerRun() ? 2 : 250;
  std::mt19937 generator(12);
  const std::vector<float> row = MakeLogits(Kind::kNormal, vocab, generator);
  for (const bool cut : {false, true}) {
    ReferenceSlot slot;
    slot.params.temperature = 1.7f;
    slot.params.seed = 99;
    if (cut) slot.params.top_p = 0.9f;
    slot.tokens = {1};
    slot.params.num_prompt_tokens = 1;
    std::vector<double> p(vocab, 0.0);
    const double max = *std::max_element(row.begin(), row.end());
    double total = 0.0, sum = 0.0;
    std::vector<int> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int x, int y) { return row[x] > row[y]; });
    for (const int id : order) total += std::exp((row[id] - max) / 1.7);
    for (const int id : order) {
      if (cut && sum >= 0.9 * total) break;
      p[id] = std::exp((row[id] - max) / 1.7);
      sum += p[id];
    }
    RigOptions options;
    options.tp = 2;
    SampleRig rig({slot}, std::vector<RigRow>(rows), Logits(rows, row), options);
    std::vector<double> seen(vocab, 0.0);
    for (int batch = 0; batch < batches; ++batch) {
      std::vector<int32_t> positions;
      for (int i = 0; i < rows; ++i) positions.push_back(1000 + batch * rows + i);
      rig.SetPositions(positions);
      rig.Run();
      for (const SampledRow& result : rig.Results()) seen[result.token] += 1.0;
    }
    if (SanitizerRun()) continue;
    double chi2 = 0.0;
    int degrees = -1;
    for (int id = 0; id < vocab; ++id) {
      const double expected = p[id] / sum * rows * batches;
      if (expected == 0.0) ASSERT_EQ(seen[id], 0.0) << id;
      if (expected < 5.0) continue;
      chi2 += (seen[id] - expected) * (seen[id] - expected) / expected;
      ++degrees;
    }
    EXPECT_LT(chi2, degrees + 5.0 * std::sqrt(2.0 * degrees)) << degrees << " degrees";
  }
}

// The same graph, launched again with other positions and parameters, and for
// batches that need less than it was captured for.
TEST(Sample, ReplaysAsAGraph) {
  Batch b = MakeBatch(SanitizerRun() ? 1001 : 32001, 24, 8);
  RigOptions options;
  options.tp = 2;
  options.pdl = true;
  options.needs = {true, true, true, true, true, true};
  SampleRig rig(b.slots, b.rows, b.logits, options);
  cudaStream_t stream;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  rig.Run(stream);
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int replay = 0; replay < 4; ++replay) {
    std::vector<int32_t> positions;
    for (const RigRow& row : b.rows) {
      positions.push_back(row.slot < 0 ? 0
                                       : static_cast<int32_t>(b.slots[row.slot].tokens.size()) - 1);
    }
    rig.SetPositions(positions);
    if (replay == 2) {
      for (size_t s = 0; s < b.slots.size(); ++s) {
        b.slots[s].params.temperature = 0.0f;
        rig.SetParams(static_cast<int>(s), Uploaded(b.slots[s]));
      }
    }
    ASSERT_CUDA(cudaGraphLaunch(exec, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    ExpectTokens(rig, b, "replay " + std::to_string(replay));
    if (HasFatalFailure()) return;
    for (size_t i = 0; i < b.rows.size(); ++i) {
      if (b.rows[i].slot >= 0) b.slots[b.rows[i].slot].tokens.push_back(rig.Results()[i].token);
    }
  }
  ASSERT_CUDA(cudaGraphExecDestroy(exec));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST(Sample, RefusesArgumentsThatCannotBe) {
  const Batch b = MakeBatch(50, 2, 4, 0);
  SampleRig rig(b.slots, b.rows, b.logits, {});
  SampleArgs args = rig.args(0);
  EXPECT_EQ(RunSamplePhase({}, kMass, args), cudaErrorInvalidValue);
  args.needs.draw = true;  // its buffers are missing
  EXPECT_EQ(RunSamplePhase({}, kMass, args), cudaErrorInvalidValue);
  args = rig.args(0);
  args.rows = 0;
  EXPECT_EQ(RunSamplePhase({}, kMaximum, args), cudaErrorInvalidValue);
  args = rig.args(0);
  args.rank = 1;
  EXPECT_EQ(RunSamplePhase({}, kFinish, args), cudaErrorInvalidValue);
  EXPECT_EQ(BuildTokenCounts({}, {}), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
