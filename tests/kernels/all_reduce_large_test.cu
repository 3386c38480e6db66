// The exchanges at the sizes that the server leaves to them at most and above, up
// to 64 MiB, exact; and what the clock says of a rank that comes late.
#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/all_reduce.h"
#include "kernels/device.cuh"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels::testing {
namespace {

template <typename T>
constexpr Type kType = sizeof(T) == 4 ? Type::kF32 : Type::kBF16;

// Small integers that change with the round: every sum is exact in either type.
float Value(int rank, int round, size_t i) {
  return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13 + round * 5) % 31) - 15.0f;
}

// `count` elements twice: in place, then apart, with other values.
template <typename T>
void ExpectExactSums(const VirtualRanks& ranks, size_t count) {
  SCOPED_TRACE(::testing::Message()
               << ranks.size() << " ranks, " << count << " elements of " << sizeof(T) << " bytes");
  std::vector<Guarded> in, out;
  for (int r = 0; r < ranks.size(); ++r) {
    ranks.Use(r);
    in.emplace_back(count * sizeof(T));
    out.emplace_back(count * sizeof(T));
  }
  std::vector<T> values(count);
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < ranks.size(); ++r) {
      ranks.Use(r);
      for (size_t i = 0; i < count; ++i) values[i] = T(Value(r, round, i));
      in[r].Set(values);
    }
    for (int r = 0; r < ranks.size(); ++r) {
      ranks.Use(r);
      AllReduceArgs args;
      args.type = kType<T>;
      args.rows = 1;
      args.hidden = static_cast<int>(count);
      args.in = in[r].get();
      args.out = round == 0 ? in[r].get() : out[r].get();
      args.max_blocks = ranks.BlocksAtOnce(256);
      const AllReducePath path = ChooseAllReduce(args, ranks.layout(), ranks.size());
      ASSERT_NE(path, AllReducePath::kNone);
      ASSERT_CUDA(AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), path, args));
    }
    ranks.Synchronize();
    if (::testing::Test::HasFatalFailure()) return;
    for (int r = 0; r < ranks.size(); ++r) {
      ranks.Use(r);
      const std::vector<T> got = (round == 0 ? in : out)[r].template Get<T>();
      for (size_t i = 0; i < count; ++i) {
        float sum = 0.0f;
        for (int from = 0; from < ranks.size(); ++from) sum += Value(from, round, i);
        ASSERT_EQ(float(got[i]), sum) << "round " << round << " rank " << r << " element " << i;
      }
      ASSERT_TRUE(in[r].GuardsIntact());
      ASSERT_TRUE(out[r].GuardsIntact());
    }
  }
}

// With the layout that the server uses: the largest goes in many pieces.
TEST(AllReduceLargeTest, SumsUpToSixtyFourMiBExactly) {
  for (const int size : {2, 4}) {
    VirtualRanks ranks(size, DefaultExchangeLayout(size));
    const size_t most = SanitizerRun() ? 64 << 10 : 64 << 20;
    for (const size_t bytes : {most / 16, most}) {
      ExpectExactSums<float>(ranks, bytes / 4);
      ExpectExactSums<__nv_bfloat16>(ranks, bytes / 2);
      if (::testing::Test::HasFatalFailure()) return;
    }
    ExpectExactSums<float>(ranks, most / 8 - 3);
    ExpectExactSums<__nv_bfloat16>(ranks, most / 8 + 5);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

__global__ void SpinKernel(uint64_t ns) {
  const uint64_t begin = DeviceClockNs();
  while (DeviceClockNs() - begin < ns) {
  }
}

// The ranks on time wait; what the late one waits is little, and nobody's wait is
// counted as transfer. Two exchanges add up.
TEST(CollectiveClockTest, CountsTheWaitForALateRank) {
  constexpr uint64_t kLateNs = 40'000'000;
  constexpr int kSize = 3, kLate = 1;
  for (const AllReducePath path :
       {AllReducePath::kOneShot, AllReducePath::kTwoShot, AllReducePath::kNone}) {
    SCOPED_TRACE(static_cast<int>(path));  // kNone: the small all-gather
    VirtualRanks ranks(kSize, ExchangeLayout{.one_shot_bytes = 1 << 20, .two_shot_bytes = 1 << 20});
    std::vector<Guarded> in, out, clocks;
    for (int r = 0; r < kSize; ++r) {
      ranks.Use(r);
      // A kernel is loaded when it is first launched, and not while others wait for it.
      SpinKernel<<<1, 1>>>(0);
      ASSERT_CUDA(cudaDeviceSynchronize());
      in.emplace_back(8 * 4096 * sizeof(float));
      out.emplace_back(8 * 4096 * sizeof(float));
      clocks.emplace_back(sizeof(CollectiveClock));
      in[r].Set(std::vector<float>(8 * 4096, 1.0f));
      clocks[r].Set(std::vector<CollectiveClock>(1));
    }
    for (int exchange = 0; exchange < 2; ++exchange) {
      for (const int r : {0, 2, kLate}) {
        ranks.Use(r);
        const Launch launch = ranks.launch(r);
        if (r == kLate) {
          SpinKernel<<<1, 1, 0, launch.stream>>>(kLateNs);
          ASSERT_CUDA(cudaGetLastError());
        }
        Peers peers = ranks.peers(r);
        peers.clock = static_cast<CollectiveClock*>(clocks[r].get());
        if (path == AllReducePath::kNone) {
          ASSERT_CUDA(
              SmallAllGather(launch, peers, ranks.layout(), in[r].get(), out[r].get(), 512));
          continue;
        }
        AllReduceArgs args;
        args.type = Type::kF32;
        args.rows = 8;
        args.hidden = 4096;
        args.in = in[r].get();
        args.out = out[r].get();
        args.max_blocks = ranks.BlocksAtOnce(512);
        ASSERT_CUDA(AllReduce(launch, peers, ranks.layout(), path, args));
      }
      ranks.Synchronize();
      if (::testing::Test::HasFatalFailure()) return;
      for (int r = 0; r < kSize; ++r) {
        ranks.Use(r);
        const CollectiveClock clock = clocks[r].Get<CollectiveClock>()[0];
        // Launches may be late themselves, by a host that does something else.
        const uint64_t most = kLateNs * (exchange + 1);
        if (r != kLate) {
          EXPECT_GT(clock.wait_ns, most / 2) << "rank " << r;
        }
        // Under a sanitizer everything takes long.
        if (!SanitizerRun()) {
          if (r == kLate) {
            EXPECT_LT(clock.wait_ns, most / 2) << "of the late rank";
          }
          EXPECT_LT(clock.transfer_ns, most / 2) << "rank " << r;
        }
        EXPECT_TRUE(clocks[r].GuardsIntact());
      }
    }
  }
}

// What is no kernel of ours, between two marks; two of them add up.
TEST(CollectiveClockTest, CountsAMarkedTransfer) {
  constexpr uint64_t kNs = 5'000'000;
  Guarded memory(sizeof(CollectiveClock));
  memory.Set(std::vector<CollectiveClock>(1));
  auto* const clock = static_cast<CollectiveClock*>(memory.get());
  for (int transfer = 0; transfer < 2; ++transfer) {
    ASSERT_CUDA(MarkTransfer(nullptr, clock, TransferMark::kBegin));
    SpinKernel<<<1, 1>>>(kNs);
    ASSERT_CUDA(MarkTransfer(nullptr, clock, TransferMark::kEnd));
    SpinKernel<<<1, 1>>>(4 * kNs);  // of nobody's transfer
  }
  ASSERT_CUDA(MarkTransfer(nullptr, clock, TransferMark::kBegin));
  SpinKernel<<<1, 1>>>(kNs);
  ASSERT_CUDA(MarkTransfer(nullptr, clock, TransferMark::kEndAside));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const CollectiveClock got = memory.Get<CollectiveClock>()[0];
  EXPECT_GE(got.transfer_ns, 2 * kNs);
  if (!SanitizerRun()) {
    EXPECT_LT(got.transfer_ns, 6 * kNs);
  }
  EXPECT_GE(got.aside_ns, kNs);
  EXPECT_EQ(got.wait_ns, 0u);
  EXPECT_TRUE(memory.GuardsIntact());
}

}  // namespace
}  // namespace lockstep::kernels::testing
