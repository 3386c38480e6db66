// Which graph serves a step: no GPU is needed to choose.
#include "worker/backend/cuda/step_graphs.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>

namespace lockstep::cuda {
namespace {

constexpr kernels::SampleNeeds kGreedy = {};

TEST(StepGraphsTest, BucketsReachFromOneRowToAllThatRunTogether) {
  for (const int max_num_seqs : {1, 5, 16, 33, 100, 256, 1024}) {
    StepGraphs graphs;
    graphs.SetLimits(max_num_seqs, 8192);
    std::set<int> buckets;
    for (int rows = 1; rows <= max_num_seqs; ++rows) {
      const int bucket = graphs.KeyFor(rows, 1, kGreedy).rows;
      EXPECT_GE(bucket, rows);
      EXPECT_LE(bucket, max_num_seqs) << "larger than any step";
      // What a step is padded by.
      EXPECT_LT(bucket - rows, rows <= 4 ? 1 : rows <= 16 ? 4 : rows <= 64 ? 8 : 32) << rows;
      EXPECT_GE(bucket, buckets.empty() ? 1 : *buckets.rbegin()) << "more rows, a smaller graph";
      buckets.insert(bucket);
    }
    EXPECT_EQ(*buckets.rbegin(), max_num_seqs);
    EXPECT_LE(buckets.size(), 45u) << "captures, of some milliseconds each";
  }
}

TEST(StepGraphsTest, AContextIsBoundedByFewLimitsUpToTheLongest) {
  constexpr int kLongest = 100'000;
  StepGraphs graphs;
  graphs.SetLimits(16, kLongest);
  std::set<int> bounds;
  for (int context = 1; context <= kLongest; context += 97) {
    const int bound = graphs.KeyFor(1, context, kGreedy).max_context;
    EXPECT_GE(bound, context);
    EXPECT_LE(bound, kLongest);
    bounds.insert(bound);
  }
  EXPECT_LE(bounds.size(), 4u);
}

TEST(StepGraphsTest, AGraphDoesAtLeastWhatItsRowsNeed) {
  StepGraphs graphs;
  graphs.SetLimits(16, 8192);
  std::set<int> kinds;
  for (int bits = 0; bits < 64; ++bits) {
    const kernels::SampleNeeds needs = {.adjust = (bits & 1) != 0,
                                        .draw = (bits & 2) != 0,
                                        .cut = (bits & 4) != 0,
                                        .nested = (bits & 8) != 0,
                                        .score = (bits & 16) != 0,
                                        .min_p = (bits & 32) != 0};
    const StepGraphs::Key key = graphs.KeyFor(3, 1, needs);
    EXPECT_TRUE(key.needs.adjust || !needs.adjust) << bits;
    EXPECT_TRUE(key.needs.draw || !needs.draw) << bits;
    EXPECT_TRUE(key.needs.cut || !needs.cut) << bits;
    EXPECT_TRUE(key.needs.nested || !needs.nested) << bits;
    EXPECT_TRUE(key.needs.score || !needs.score) << bits;
    EXPECT_TRUE(key.needs.min_p || !needs.min_p) << bits;
    kinds.insert(key.sampling);
  }
  EXPECT_LE(kinds.size(), 6u);
  const StepGraphs::Key greedy = graphs.KeyFor(3, 1, kGreedy);
  EXPECT_FALSE(greedy.needs.draw || greedy.needs.adjust || greedy.needs.score)
      << "greedy rows pay for no other";
  EXPECT_EQ(graphs.Find(greedy), nullptr) << "nothing was captured";
}

TEST(StepGraphsTest, UsualStepsAreCapturedBeforehandAndOnce) {
  for (const int longest : {160, 2048, 5000, 8192, 100'000}) {
    StepGraphs graphs;
    graphs.SetLimits(100, longest);
    std::set<std::tuple<int, int, int>> usual;
    for (const StepGraphs::Key& key : graphs.Usual())
      EXPECT_TRUE(usual.insert(key.tied()).second) << "twice";
    for (int rows = 1; rows <= 100; ++rows) {
      for (const int context : {1, 2048, 2049, 8192}) {
        if (context > longest) continue;
        for (const kernels::SampleNeeds& needs :
             {kGreedy, kernels::SampleNeeds{.draw = true}, {.draw = true, .cut = true}})
          EXPECT_EQ(usual.count(graphs.KeyFor(rows, context, needs).tied()), 1u)
              << rows << " rows, context " << context << " of " << longest;
      }
    }
    EXPECT_LE(usual.size(), 6 * 20u) << "captures, of some milliseconds each";
  }
}

}  // namespace
}  // namespace lockstep::cuda
