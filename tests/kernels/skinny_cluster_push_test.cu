// A product of few rows that pushes its sums, and the all-reduce that collects them: the same bits
// as storing them and summing what was stored. The ranks' products run one after another.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/all_reduce.h"
#include "kernels/skinny_cluster.h"
#include "tests/kernels/gemv_case.cuh"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels::testing {
namespace {

struct Shape {
  int ranks, m, hidden, k;
};

uint64_t seed = 5000;

// One rank's part of K of a row-parallel product, and what the all-reduce makes of it.
template <typename W, typename T>
struct RankCase {
  explicit RankCase(const Shape& s)
      : weights(sizeof(W) * s.hidden * s.k),
        scales(sizeof(float) * s.hidden),
        x(sizeof(T) * s.m * s.k),
        partial(sizeof(T) * s.m * s.hidden) {
    for (int way = 0; way < 2; ++way) {
      residual.emplace_back(sizeof(T) * s.m * s.hidden);
      normed.emplace_back(sizeof(T) * s.m * s.hidden);
    }
    Fill(weights.get<W>(), int64_t{s.hidden} * s.k, seed += 10, 0.05f);
    scales.Write(std::vector<float>(s.hidden, 1e-3f));
  }
  Memory weights, scales, x, partial;
  std::vector<Memory> residual, normed;  // summed from what was stored, and pushed
};

template <typename W, typename T>
void Check(const Shape& s) {
  SCOPED_TRACE(::testing::Message()
               << s.ranks << " ranks, " << s.m << " x " << s.hidden << " x " << s.k);
  VirtualRanks ranks(s.ranks, DefaultExchangeLayout(s.ranks));
  std::vector<std::unique_ptr<RankCase<W, T>>> cases;
  std::vector<Memory> weights;
  for (int r = 0; r < s.ranks; ++r) {
    ranks.Use(r);
    ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
    cases.push_back(std::make_unique<RankCase<W, T>>(s));
    weights.emplace_back(sizeof(T) * s.hidden);
    Fill(weights.back().get<T>(), s.hidden, 77, 1.0f);
    for (Memory& residual : cases[r]->residual) Fill(residual.get<T>(), s.m * s.hidden, 78, 1.0f);
  }
  ranks.SynchronizeDevices();
  // The residual streams go on from round to round, so that no round is like another; both slots
  // of the exchange are used in turn.
  for (int round = 0; round < (SanitizerRun() ? 2 : 20); ++round) {
    for (int r = 0; r < s.ranks; ++r) {
      ranks.Use(r);
      Fill(cases[r]->x.template get<T>(), s.m * s.k, seed += 10, 2.0f);
    }
    ranks.SynchronizeDevices();
    for (const bool pushed : {false, true}) {
      for (int r = 0; r < s.ranks; ++r) {
        ranks.Use(r);
        RankCase<W, T>& c = *cases[r];
        SkinnyClusterArgs args = {.weights = c.weights.get(),
                                  .type = TypeOf<W>(),
                                  .n = s.hidden,
                                  .k = s.k,
                                  .m = s.m,
                                  .x = c.x.get(),
                                  .out_type = TypeOf<T>(),
                                  .out = c.partial.get()};
        if (sizeof(W) == 1) args.weight_scales = c.scales.template get<float>();
        if (pushed) {
          args.epilogue = GemvEpilogue::kPush;
          args.push = OneShotPush(ranks.peers(r), ranks.layout());
          args.out = nullptr;
        }
        ASSERT_TRUE(SkinnyClusterSupports(args));
        ASSERT_CUDA(SkinnyCluster(ranks.launch(r), args));
      }
      ranks.Synchronize();
      for (int r = 0; r < s.ranks; ++r) {
        ranks.Use(r);
        RankCase<W, T>& c = *cases[r];
        AllReduceArgs args = {.type = TypeOf<T>(), .rows = s.m, .hidden = s.hidden};
        args.in = pushed ? nullptr : c.partial.get();
        args.pushed = pushed;
        args.residual = args.residual_out = c.residual[pushed].get();
        args.out = c.normed[pushed].get();
        args.norm_weight = weights[r].get();
        args.max_blocks = ranks.BlocksAtOnce(512);
        const AllReducePath path = ChooseAllReduce(args, ranks.layout(), s.ranks);
        if (pushed) {
          ASSERT_EQ(path, AllReducePath::kOneShot);
        }
        ASSERT_CUDA(AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), path, args));
      }
      ranks.Synchronize();
    }
    for (int r = 0; r < s.ranks; ++r) {
      ranks.Use(r);
      for (std::vector<Memory>* both : {&cases[r]->residual, &cases[r]->normed}) {
        const std::vector<uint16_t> stored = (*both)[0].template Read<uint16_t>();
        ASSERT_EQ((*both)[1].template Read<uint16_t>(), stored)
            << "rank " << r << " round " << round;
        ASSERT_EQ((*both)[1].template Read<uint16_t>(),
                  (both == &cases[r]->residual ? cases[0]->residual : cases[0]->normed)[1]
                      .template Read<uint16_t>())
            << "rank " << r << " round " << round;
        EXPECT_TRUE((*both)[0].GuardsIntact() && (*both)[1].GuardsIntact());
      }
    }
  }
}

std::vector<Shape> Shapes() {
  if (SanitizerRun()) return {{2, 3, 64, 256}, {4, 17, 136, 512}};
  return {{2, 2, 64, 256},   {2, 16, 4096, 2048}, {2, 32, 8192, 1024}, {4, 1, 512, 256},
          {4, 7, 1032, 512}, {4, 16, 4096, 1024}, {4, 13, 8192, 2048}, {4, 29, 4096, 3584}};
}

TEST(SkinnyClusterPushTest, GivesTheBitsOfStoringAndSumming) {
  for (const Shape& shape : Shapes()) {
    Check<__nv_bfloat16, __nv_bfloat16>(shape);
    Check<__half, __half>(shape);
    if (shape.m <= 16) Check<__nv_fp8_e4m3, __nv_bfloat16>(shape);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(SkinnyClusterPushTest, RefusesWhatItCannotDo) {
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  VirtualRanks ranks(2, DefaultExchangeLayout(2));
  RankCase<__nv_bfloat16, __nv_bfloat16> c({2, 4, 64, 256});
  SkinnyClusterArgs args = {.weights = c.weights.get(), .n = 64, .k = 256, .m = 4, .x = c.x.get()};
  args.epilogue = GemvEpilogue::kPush;
  args.push = OneShotPush(ranks.peers(0), ranks.layout());
  ASSERT_TRUE(SkinnyClusterSupports(args));
  const auto refused = [&](auto change) {
    SkinnyClusterArgs changed = args;
    change(changed);
    return !SkinnyClusterSupports(changed);
  };
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.push = {}; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.m = 33; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.n = 60; }));
  AllReduceArgs sum = {.rows = 4, .hidden = 64};
  sum.pushed = true;  // without anything that makes it rows
  EXPECT_EQ(ChooseAllReduce(sum, ranks.layout(), 2), AllReducePath::kNone);
  sum.residual = c.residual[0].get();
  EXPECT_EQ(ChooseAllReduce(sum, ranks.layout(), 2), AllReducePath::kOneShot);
  const int32_t slots[4] = {};
  sum.slots = slots;  // what is padding would stay in its slot
  EXPECT_EQ(ChooseAllReduce(sum, ranks.layout(), 2), AllReducePath::kNone);
}

}  // namespace
}  // namespace lockstep::kernels::testing
