// Thousands of rounds of exchanges in replayed CUDA graphs: nothing but the
// exchanges keeps the ranks together.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/all_reduce.h"
#include "tests/kernels/exchange_rounds.h"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels::testing {
namespace {

struct RankState {
  cudaGraphExec_t graph = nullptr;
  Guarded in{RoundsBuffers::kBytes}, residual{RoundsBuffers::kBytes}, out{RoundsBuffers::kBytes},
      weight{RoundsBuffers::kWeightBytes}, progress{sizeof(RoundsProgress)};
};

void Prepare(const VirtualRanks& ranks, int rank, Type type, bool pdl, RankState* state,
             int* rounds) {
  ranks.Use(rank);
  state->progress.Set(std::vector<RoundsProgress>(1));
  state->weight.Set(std::vector<uint32_t>(RoundsBuffers::kWeightBytes / 4, 0x3F803F80));
  const Launch launch = ranks.launch(rank, pdl);
  const RoundsBuffers buffers{state->in.get(), state->residual.get(), state->out.get(),
                              state->weight.get(),
                              static_cast<RoundsProgress*>(state->progress.get())};
  ASSERT_CUDA(cudaStreamBeginCapture(launch.stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_CUDA(EnqueueRounds(launch, ranks.peers(rank), ranks.layout(), type, ranks.BlocksAtOnce(1),
                            buffers, rounds));
  cudaGraph_t graph = nullptr;
  ASSERT_CUDA(cudaStreamEndCapture(launch.stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&state->graph, graph, 0));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaGraphUpload(state->graph, launch.stream));
  ASSERT_CUDA(cudaDeviceSynchronize());
}

void Soak(int size, Type type, bool pdl, int replays) {
  SCOPED_TRACE(::testing::Message() << size << " ranks, pdl " << pdl);
  VirtualRanks ranks(size, kRoundsLayout);
  ranks.set_patience_ns(5'000'000'000);
  std::vector<RankState> states;
  int rounds = 0;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    Prepare(ranks, r, type, pdl, &states.emplace_back(), &rounds);
    if (::testing::Test::HasFatalFailure()) return;
  }
  ranks.Synchronize();
  for (int i = 0; i < replays; ++i) {
    // Who comes first changes too.
    for (int j = 0; j < size; ++j) {
      const int r = (i + j) % size;
      ranks.Use(r);
      ASSERT_CUDA(cudaGraphLaunch(states[r].graph, ranks.launch(r).stream));
    }
  }
  ranks.Synchronize();
  if (::testing::Test::HasFatalFailure()) return;
  unsigned long long digest = 0;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    const RoundsProgress p = states[r].progress.Get<RoundsProgress>()[0];
    EXPECT_EQ(p.round, static_cast<unsigned long long>(rounds) * replays);
    EXPECT_EQ(p.errors, 0u) << "rank " << r;
    if (r == 0) digest = p.digest;
    EXPECT_EQ(p.digest, digest) << "rank " << r << " has other bits than rank 0";
    EXPECT_TRUE(states[r].in.GuardsIntact() && states[r].out.GuardsIntact() &&
                states[r].residual.GuardsIntact());
    cudaGraphExecDestroy(states[r].graph);
  }
}

int Replays() { return SanitizerRun() ? 2 : 300; }

TEST(AllReduceSoakTest, TwoRanksStayExact) {
  Soak(2, Type::kBF16, false, Replays());
  Soak(2, Type::kBF16, true, Replays());
}
TEST(AllReduceSoakTest, FourRanksStayExact) {
  Soak(4, Type::kBF16, false, Replays());
  Soak(4, Type::kF32, true, Replays());
}
TEST(AllReduceSoakTest, AnyNumberOfRanksStaysExact) {
  for (const int size : {3, 5, 6, 7, 8}) {
    if (SanitizerRun() && size > 3) return;
    Soak(size, Type::kBF16, true, Replays() / 3 + 1);
  }
}

}  // namespace
}  // namespace lockstep::kernels::testing
