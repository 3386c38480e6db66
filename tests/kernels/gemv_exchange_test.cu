// The all-reduce that is folded into its neighbours: kPush and kReduce of
// kernels/gemv.h. Ranks are streams, spread over the devices there are; on one
// device their grids are small enough to run beside each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/bulk_copy.cuh"
#include "kernels/gemv.h"
#include "tests/kernels/gemv_group.cuh"

namespace lockstep::kernels::testing {
namespace {

template <typename T>
T Rounded(float v) {
  return T(v);
}

// Rounds of push and reduce with whole numbers that T holds exactly: every residual
// of every round is known to the bit.
template <typename T>
void ExpectExactRounds(int size, int width, int rounds, bool pdl) {
  SCOPED_TRACE(std::to_string(size) + " ranks, width " + std::to_string(width));
  constexpr int kInput = 64, kOut = 24;  // k of the push, n of the reduce
  Group group(size, width);
  std::mt19937 random(static_cast<unsigned>(size * 1000 + width));
  const auto whole = [&](int limit) {
    return static_cast<float>(static_cast<int>(random() % (2 * limit + 1)) - limit);
  };

  std::vector<std::vector<T>> weights(size), inputs(size);
  std::vector<T> next(size_t{kOut} * width), norm(width), start(width);
  for (T& v : next) v = Rounded<T>(whole(2) * 0.125f);
  for (T& v : norm) v = Rounded<T>(1.0f + whole(3) * 0.25f);
  for (T& v : start) v = Rounded<T>(whole(100));
  struct Rank {
    std::unique_ptr<Memory> weights, inputs, next, norm, residuals, outs;
  };
  std::vector<Rank> ranks(size);
  for (int r = 0; r < size; ++r) {
    weights[r].resize(size_t(width) * kInput);
    inputs[r].resize(size_t(rounds) * kInput);
    for (T& v : weights[r]) v = Rounded<T>(whole(2));
    for (T& v : inputs[r]) v = Rounded<T>(random() % 6 == 0 ? whole(1) : 0.0f);
    group.Use(r);
    Rank& rank = ranks[r];
    rank.weights = Upload(weights[r]);
    rank.inputs = Upload(inputs[r]);
    rank.next = Upload(next);
    rank.norm = Upload(norm);
    std::vector<T> history(size_t(rounds + 1) * width);
    std::copy(start.begin(), start.end(), history.begin());
    rank.residuals = Upload(history);
    rank.outs = std::make_unique<Memory>(sizeof(T) * rounds * kOut);
  }

  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < size; ++i) {
      const int r = (i + round) % size;  // everyone is late now and then
      group.Use(r);
      const Rank& rank = ranks[r];
      const GemvExchange exchange = group.Exchange(r);
      GemvArgs args;
      args.weight_type = args.type = TypeOf<T>();
      args.exchange = &exchange;
      args.exchange_number = static_cast<uint32_t>(round);
      args.max_blocks = group.Blocks(pdl ? 2 : 1);
      GemvArgs push = args;
      push.weights = rank.weights->get();
      push.n = width;
      push.k = kInput;
      push.x = rank.inputs->template get<T>() + size_t(round) * kInput;
      push.epilogue = GemvEpilogue::kPush;
      ASSERT_EQ(Gemv({group.stream(r), pdl && group.device_each()}, push), cudaSuccess);
      GemvArgs reduce = args;
      reduce.weights = rank.next->get();
      reduce.n = kOut;
      reduce.k = width;
      reduce.prologue = GemvPrologue::kReduce;
      reduce.norm_weight = rank.norm->get();
      reduce.residual_in = rank.residuals->template get<T>() + size_t(round) * width;
      reduce.residual_out = rank.residuals->template get<T>() + size_t(round + 1) * width;
      reduce.out = rank.outs->template get<T>() + size_t(round) * kOut;
      ASSERT_EQ(Gemv({group.stream(r), pdl}, reduce), cudaSuccess);
    }
  }
  group.Synchronize();
  if (::testing::Test::HasFatalFailure()) return;

  std::vector<std::vector<T>> residuals(size), outs(size);
  for (int r = 0; r < size; ++r) {
    group.Use(r);
    residuals[r] = ranks[r].residuals->template Read<T>();
    outs[r] = ranks[r].outs->template Read<T>();
    ASSERT_TRUE(ranks[r].residuals->GuardsIntact()) << "rank " << r;
    ASSERT_TRUE(ranks[r].outs->GuardsIntact()) << "rank " << r;
  }
  std::vector<float> residual(width);
  for (int i = 0; i < width; ++i) residual[i] = static_cast<float>(start[i]);
  for (int round = 0; round < rounds; ++round) {
    double squares = 0;
    for (int i = 0; i < width; ++i) {
      float sum = 0;
      for (int r = 0; r < size; ++r) {
        for (int j = 0; j < kInput; ++j) {
          const float x = static_cast<float>(inputs[r][size_t(round) * kInput + j]);
          if (x != 0) sum += x * static_cast<float>(weights[r][size_t(i) * kInput + j]);
        }
      }
      residual[i] = static_cast<float>(Rounded<T>(residual[i] + sum));
      squares += double(residual[i]) * residual[i];
      for (int r = 0; r < size; ++r) {
        ASSERT_EQ(static_cast<float>(residuals[r][size_t(round + 1) * width + i]), residual[i])
            << "round " << round << " rank " << r << " element " << i;
      }
    }
    const double scale = 1 / std::sqrt(squares / width + 1e-5);
    for (int o = 0; o < kOut; ++o) {
      double wanted = 0, magnitude = 0, flips = 0;
      for (int i = 0; i < width; ++i) {
        const double exact = residual[i] * scale * static_cast<double>(static_cast<float>(norm[i]));
        const double weight = static_cast<float>(next[size_t(o) * width + i]);
        const auto rounded = [&](double nudge) {
          return static_cast<double>(
              static_cast<float>(Rounded<T>(static_cast<float>(exact * (1 + nudge)))));
        };
        wanted += rounded(0) * weight;
        magnitude += std::fabs(rounded(0) * weight);
        // An element between two values of T may become either.
        flips += std::fabs((rounded(1e-6) - rounded(-1e-6)) * weight);
      }
      for (int r = 0; r < size; ++r) {
        const double got = static_cast<float>(outs[r][size_t(round) * kOut + o]);
        const double slack = flips + 4e-6 * magnitude;
        ASSERT_NEAR(got, wanted, HalfUlp<T>() * 1.01 * (std::fabs(wanted) + slack) + slack)
            << "round " << round << " rank " << r << " output " << o;
      }
    }
  }
}

TEST(GemvExchangeTest, SumsExactlyWhateverTheRound) {
  const int rounds = SanitizerRun() ? 9 : 700;
  for (int size : {2, 3, 4, 8}) {
    if (SanitizerRun() && size > 4) continue;
    ExpectExactRounds<__nv_bfloat16>(size, size == 4 ? 1024 : 256, rounds, false);
    if (::testing::Test::HasFailure()) return;
  }
  ExpectExactRounds<__half>(2, 520, rounds, false);
}

// Of a row whose push is on all SMs: a smaller one's reduction waits for the push, and so does one
// of ranks that share a device. A group of one polls for its own words.
TEST(GemvExchangeTest, PollsBeforeThePushHasEnded) {
  const int rounds = SanitizerRun() ? 9 : 300;
  for (int size : {1, 2, 4}) {
    ExpectExactRounds<__nv_bfloat16>(size, 4096, rounds, true);
    if (::testing::Test::HasFailure()) return;
  }
}

// What a decode step does: products that feed each other through exchanges, as a
// graph that is replayed; two residuals in turn. Any number of blocks gives the
// same bits, on every rank.
std::vector<std::vector<uint16_t>> RunGraphs(int size, int blocks_at_once, bool fp8, int replays) {
  using T = __nv_bfloat16;
  constexpr int kWidth = 2048, kLocal = 256;  // a push on all SMs
  Group group(size, kWidth);
  struct Rank {
    std::unique_ptr<Memory> push, next, scales, norm, residuals, x;
    cudaGraphExec_t exec = nullptr;
  };
  std::vector<Rank> ranks(size);
  for (int r = 0; r < size; ++r) {
    group.Use(r);
    Rank& rank = ranks[r];
    const size_t count = size_t{kWidth} * kLocal;
    rank.push = std::make_unique<Memory>(count * 2);
    rank.next = std::make_unique<Memory>(count * 2);
    Fill(rank.push->get<T>(), count, 100 + r, 0.1f);
    if (fp8) {
      Fill(rank.next->get<__nv_fp8_e4m3>(), count, 200 + r, 1.0f);
    } else {
      Fill(rank.next->get<T>(), count, 200 + r, 0.05f);
    }
    rank.scales = Upload(std::vector<float>(kLocal, 0.0005f));
    rank.norm = std::make_unique<Memory>(2 * kWidth);
    Fill(rank.norm->get<T>(), kWidth, 7, 1.0f);
    rank.residuals = std::make_unique<Memory>(4 * kWidth);
    Fill(rank.residuals->get<T>(), 2 * kWidth, 8, 1.0f);
    rank.x = std::make_unique<Memory>(2 * kLocal);
    Fill(rank.x->get<T>(), kLocal, 300 + r, 1.0f);
    EXPECT_CUDA(cudaDeviceSynchronize());

    const bool pdl = group.device_each();
    cudaGraph_t graph = nullptr;
    EXPECT_CUDA(cudaStreamBeginCapture(group.stream(r), cudaStreamCaptureModeThreadLocal));
    for (uint32_t number = 0; number < 4; ++number) {
      const GemvExchange exchange = group.Exchange(r);
      GemvArgs push;
      push.weights = rank.push->get();
      push.n = kWidth;
      push.k = kLocal;
      push.x = rank.x->get();
      push.epilogue = GemvEpilogue::kPush;
      push.exchange = &exchange;
      push.exchange_number = number;
      push.max_blocks = group.Blocks(blocks_at_once);
      EXPECT_CUDA(Gemv({group.stream(r), pdl}, push));
      GemvArgs reduce = push;
      reduce.weights = rank.next->get();
      reduce.weight_type = fp8 ? Type::kE4M3 : Type::kBF16;
      reduce.scales = rank.scales->get<float>();
      reduce.n = kLocal;
      reduce.k = kWidth;
      reduce.epilogue = GemvEpilogue::kStore;
      reduce.out = rank.x->get();
      reduce.prologue = GemvPrologue::kReduce;
      reduce.norm_weight = rank.norm->get();
      reduce.residual_in = rank.residuals->get<T>() + (number % 2) * kWidth;
      reduce.residual_out = rank.residuals->get<T>() + ((number + 1) % 2) * kWidth;
      EXPECT_CUDA(Gemv({group.stream(r), pdl}, reduce));
    }
    EXPECT_CUDA(cudaStreamEndCapture(group.stream(r), &graph));
    EXPECT_CUDA(cudaGraphInstantiate(&rank.exec, graph, 0));
    EXPECT_CUDA(cudaGraphDestroy(graph));
    EXPECT_CUDA(cudaGraphUpload(rank.exec, group.stream(r)));
    EXPECT_CUDA(cudaStreamSynchronize(group.stream(r)));
  }
  for (int i = 0; i < replays; ++i) {
    for (int r = 0; r < size; ++r) {
      group.Use(r);
      EXPECT_CUDA(cudaGraphLaunch(ranks[r].exec, group.stream(r)));
    }
  }
  group.Synchronize();
  std::vector<std::vector<uint16_t>> residuals;
  for (int r = 0; r < size; ++r) {
    group.Use(r);
    residuals.push_back(ranks[r].residuals->Read<uint16_t>());
    EXPECT_TRUE(ranks[r].residuals->GuardsIntact() && ranks[r].x->GuardsIntact()) << "rank " << r;
    EXPECT_CUDA(cudaGraphExecDestroy(ranks[r].exec));
    ranks[r] = Rank{};
  }
  return residuals;
}

TEST(GemvExchangeTest, ReplaysAsAGraph) {
  for (bool fp8 : {false, true}) {
    for (int size : {1, 2, 4}) {
      const int replays = SanitizerRun() ? 3 : 500;
      const auto first = RunGraphs(size, 1, fp8, replays),
                 second = RunGraphs(size, 3, fp8, replays);
      ASSERT_FALSE(::testing::Test::HasFailure());
      for (int r = 0; r < size; ++r) {
        EXPECT_EQ(first[r], first[0]) << "rank " << r;
        EXPECT_EQ(second[r], first[0]) << "rank " << r;
      }
      int nans = 0;
      for (uint16_t bits : first[0]) nans += (bits & 0x7fffu) > 0x7f80u;
      EXPECT_EQ(nans, 0);
    }
  }
}

// A NaN arrives as one instead of never.
TEST(GemvExchangeTest, CarriesNans) {
  Group group(2, OneRound::kWidth);
  OneRound ranks[] = {{group, 0, std::nanf("")}, {group, 1, 1.0f}};
  for (OneRound& rank : ranks) rank.Launch(0);
  group.Synchronize();
  for (const OneRound& rank : ranks) {
    for (const auto v : rank.Residual()) ASSERT_TRUE(std::isnan(static_cast<float>(v)));
  }
}

__global__ void SpinKernel(uint64_t ns) {
  const uint64_t begin = GlobalTimerNs();
  while (GlobalTimerNs() - begin < ns) {
  }
}

// The rank on time waits from its own push on; the late one's wait is none.
TEST(GemvExchangeTest, CountsTheWaitForALateRank) {
  constexpr uint64_t kLateNs = 30'000'000;
  Group group(2, OneRound::kWidth);
  OneRound ranks[] = {{group, 0, 1.0f}, {group, 1, 2.0f}};
  std::unique_ptr<Memory> clocks[2];
  for (int r = 0; r < 2; ++r) {
    group.Use(r);
    clocks[r] = Upload(std::vector<CollectiveClock>(1));
    SpinKernel<<<1, 1>>>(0);  // loaded now: it could not be while a rank waits
    EXPECT_CUDA(cudaDeviceSynchronize());
  }
  for (uint32_t number = 0; number < 2; ++number) {
    group.Use(1);
    SpinKernel<<<1, 1, 0, group.stream(1)>>>(kLateNs);
    for (const int r : {0, 1}) ranks[r].Launch(number, clocks[r]->get<CollectiveClock>());
    group.Synchronize();
    uint64_t waits[2];
    for (int r = 0; r < 2; ++r) {
      group.Use(r);
      const CollectiveClock clock = clocks[r]->Read<CollectiveClock>()[0];
      EXPECT_EQ(clock.transfer_ns, 0u);
      EXPECT_TRUE(clocks[r]->GuardsIntact());
      waits[r] = clock.wait_ns;
    }
    EXPECT_GT(waits[0], (number + 1) * kLateNs / 2);
    if (!SanitizerRun()) {  // under one all launches are late
      EXPECT_LT(waits[1], (number + 1) * kLateNs / 2);
    }
  }
}

// A rank that never pushes, and a group that is given up: the wait ends without a trap.
TEST(GemvExchangeTest, StopsWaitingWhenTheGroupIsGivenUp) {
  constexpr int kWidth = 256;
  Group group(2, kWidth);
  group.Use(0);
  uint32_t* abort = nullptr;
  EXPECT_CUDA(cudaHostAlloc(&abort, sizeof(*abort), cudaHostAllocMapped));
  *abort = 0;
  Memory aborted(sizeof(uint32_t)), weights(2 * kWidth * 64), norm(2 * kWidth),
      residuals(4 * kWidth), out(2 * 64);
  EXPECT_CUDA(cudaMemset(aborted.get(), 0, sizeof(uint32_t)));
  Fill(weights.get<__nv_bfloat16>(), kWidth * 64, 1, 1.0f);
  GemvExchange exchange = group.Exchange(0);
  exchange.peers.abort = abort;
  exchange.peers.aborted = aborted.get<uint32_t>();
  GemvArgs args;
  args.weights = weights.get();
  args.n = 64;
  args.k = kWidth;
  args.prologue = GemvPrologue::kReduce;
  args.exchange = &exchange;
  args.norm_weight = norm.get();
  args.residual_in = residuals.get();
  args.residual_out = residuals.get<__nv_bfloat16>() + kWidth;
  args.out = out.get();
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_CUDA(Gemv({group.stream(0)}, args));
  EXPECT_EQ(cudaStreamQuery(group.stream(0)), cudaErrorNotReady);
  *static_cast<volatile uint32_t*>(abort) = 1;
  EXPECT_CUDA(cudaStreamSynchronize(group.stream(0)));
  EXPECT_EQ(aborted.Read<uint32_t>()[0], 1u);
  EXPECT_EQ(group.fault().code, PeerWait::kNothing);
  EXPECT_CUDA(cudaFreeHost(abort));
}

// In a process of its own: a trap ends the context. 0: all is as it should be.
int WaitInVain() {
  constexpr int kWidth = 256;
  Group group(3, kWidth);
  group.set_patience_ns(20'000'000);
  Memory weights(2 * kWidth * 64), x(2 * kWidth), residual(2 * kWidth), other(2 * kWidth);
  Fill(weights.get<__nv_bfloat16>(), kWidth * 64, 1, 1.0f);
  Fill(x.get<__nv_bfloat16>(), kWidth, 2, 1.0f);
  EXPECT_CUDA(cudaDeviceSynchronize());
  for (int r : {0, 2}) {  // rank 1 never pushes
    group.Use(r);
    const GemvExchange exchange = group.Exchange(r);
    GemvArgs args;
    args.weights = weights.get();
    args.n = kWidth;
    args.k = 64;
    args.x = x.get();
    args.epilogue = GemvEpilogue::kPush;
    args.exchange = &exchange;
    args.exchange_number = 6;
    args.max_blocks = 8;
    EXPECT_CUDA(Gemv({group.stream(r)}, args));
    EXPECT_CUDA(cudaStreamSynchronize(group.stream(r)));
  }
  group.Use(0);
  const GemvExchange exchange = group.Exchange(0);
  GemvArgs args;
  args.weights = weights.get();
  args.n = 64;
  args.k = kWidth;
  args.prologue = GemvPrologue::kReduce;
  args.exchange = &exchange;
  args.exchange_number = 6;
  args.norm_weight = x.get();
  args.residual_in = residual.get();
  args.residual_out = other.get();
  args.out = x.get();
  EXPECT_CUDA(Gemv({group.stream(0)}, args));
  if (cudaStreamSynchronize(group.stream(0)) == cudaSuccess) return 1;
  const PeerFault& fault = group.fault();
  if (fault.code != PeerWait::kPushedPartial) return 2;
  if (fault.exchange != 6 || fault.rank != 1) return 3;
  return 0;
}

TEST(GemvExchangeDeathTest, NamesTheRankThatNeverCame) {
  if (SanitizerRun()) return;  // which would report the trap
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::_Exit(WaitInVain()), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace lockstep::kernels::testing
