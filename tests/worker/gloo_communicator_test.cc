#include "worker/comm/gloo_communicator.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "model/memory_model.h"
#include "tests/fakes/exchanges.h"
#include "tests/fakes/process_state.h"
#include "tests/worker/gloo_ranks.h"

namespace lockstep {
namespace {

using gloo_testing::OnThreads;
using gloo_testing::Ranks;

// Small integers: sums of them are exact in float32.
std::vector<float> Integers(int rank, size_t count, uint32_t round) {
  std::minstd_rand random(round * 977 + rank * 31 + 1);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(static_cast<int>(random() % 2001) - 1000);
  return values;
}

std::vector<float> ExpectedSum(int size, size_t count, uint32_t round) {
  std::vector<float> sum(count, 0.0f);
  for (int rank = 0; rank < size; ++rank) {
    const std::vector<float> values = Integers(rank, count, round);
    for (size_t i = 0; i < count; ++i) sum[i] += values[i];
  }
  return sum;
}

// Values whose sum depends on the order of the additions.
std::vector<float> Reals(int rank, size_t count) {
  std::mt19937 random(rank + 1);
  std::vector<float> values(count);
  for (float& v : values) {
    v = std::ldexp(static_cast<float>(random()) / 4e9f - 0.5f, static_cast<int>(random() % 24));
  }
  return values;
}

std::vector<float> Tree(int first, int width, int size, size_t count) {
  if (width == 1) return Reals(first, count);
  std::vector<float> low = Tree(first, width / 2, size, count);
  if (first + width / 2 >= size) return low;
  const std::vector<float> high = Tree(first + width / 2, width / 2, size, count);
  for (size_t i = 0; i < count; ++i) low[i] += high[i];
  return low;
}

class GlooCommunicatorSizes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, GlooCommunicatorSizes, ::testing::Values(1, 2, 3, 4, 5, 6, 7, 8));

TEST_P(GlooCommunicatorSizes, SumsExactlyOverSizesAndRounds) {
  const int size = GetParam();
  OnThreads(size, [&](RankCommunicator& comm) {
    uint32_t round = 0;
    for (const size_t count :
         {1u, 2u, 17u, 1024u, 4096u, 16383u, 16384u, 16385u, 17409u, 65536u, 100'003u, 1u << 20}) {
      for (int repeat = 0; repeat < (count > 50'000 ? 1 : 4); ++repeat, ++round) {
        std::vector<float> values = Integers(comm.rank(), count, round);
        const absl::Status status = comm.AllReduceSum(absl::MakeSpan(values));
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_EQ(values, ExpectedSum(size, count, round)) << count << " values, round " << round;
      }
    }
    EXPECT_EQ(comm.stats().count, round);
  });
}

TEST_P(GlooCommunicatorSizes, AddsAsABinaryTreeOverRankOrder) {
  const int size = GetParam();
  int width = 1;
  while (width < size) width *= 2;
  for (const size_t count : {33u, 70'001u, 300'000u}) {
    const std::vector<float> expected = Tree(0, width, size, count);
    OnThreads(size, [&](RankCommunicator& comm) {
      std::vector<float> values = Reals(comm.rank(), count);
      ASSERT_TRUE(comm.AllReduceSum(absl::MakeSpan(values)).ok());
      EXPECT_EQ(std::memcmp(values.data(), expected.data(), count * sizeof(float)), 0)
          << count << " values";
    });
  }
}

TEST_P(GlooCommunicatorSizes, GathersInRankOrderAndBroadcasts) {
  const int size = GetParam();
  OnThreads(size, [&](RankCommunicator& comm) {
    for (const size_t count : {0u, 1u, 999u, 50'000u, 300'001u}) {
      for (const int root : {0, size - 1}) {
        const bool is_root = comm.rank() == root;
        const std::vector<float> mine = Integers(comm.rank(), count, 7);
        std::vector<float> all(is_root ? count * size : 0);
        ASSERT_TRUE(comm.Gather(mine, absl::MakeSpan(all), root).ok());
        for (int rank = 0; is_root && rank < size; ++rank) {
          const std::vector<float> expected = Integers(rank, count, 7);
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), all.begin() + rank * count));
        }
        std::vector<float> data = Integers(is_root ? 100 : 200, count, 9);
        ASSERT_TRUE(
            comm.Broadcast({reinterpret_cast<std::byte*>(data.data()), count * sizeof(float)}, root)
                .ok());
        ASSERT_EQ(data, Integers(100, count, 9));
      }
    }
    ASSERT_TRUE(comm.Barrier().ok());
  });
}

TEST_P(GlooCommunicatorSizes, HoldsTheBuffersThatTheMemoryModelPredicts) {
  const int size = GetParam();
  ModelConfig config;
  config.num_heads = config.num_kv_heads = size;
  config.hidden_size = config.embedding_dim = config.intermediate_size = 16 * size;
  config.head_dim = 16;
  config.num_layers = 1;
  config.vocab_size = 16;
  config.max_position_embeddings = 8192;
  const absl::StatusOr<RankMemory> memory =
      PredictRankMemory(config, {}, size, 0, BackendKind::kCpu);
  ASSERT_TRUE(memory.ok()) << memory.status();
  OnThreads(size, [&](RankCommunicator& comm) {
    EXPECT_EQ(comm.buffer_bytes(), static_cast<uint64_t>(memory->communication_bytes));
  });
}

TEST(GlooCommunicator, KeepsThousandsOfMixedRoundsApart) {
  for (const int size : {2, 3, 4}) {
    OnThreads(size, [&](RankCommunicator& comm) {
      for (uint32_t round = 0; round < (size == 2 ? 3000u : 1000u); ++round) {
        const size_t count = 1 + round * 37 % 600;
        std::vector<float> values = Integers(comm.rank(), count, round);
        ASSERT_TRUE(comm.AllReduceSum(absl::MakeSpan(values)).ok());
        ASSERT_EQ(values, ExpectedSum(size, count, round)) << "round " << round;
        if (round % 3 == 0) {
          uint32_t token = comm.rank() == 0 ? round : 0;
          ASSERT_TRUE(comm.Broadcast({reinterpret_cast<std::byte*>(&token), sizeof token}, 0).ok());
          ASSERT_EQ(token, round);
        }
        if (round % 5 == 0) {
          const float mine = static_cast<float>(comm.rank() + round);
          std::vector<float> all(comm.rank() == 0 ? size : 0);
          ASSERT_TRUE(comm.Gather({&mine, 1}, absl::MakeSpan(all), 0).ok());
          if (comm.rank() == 0) {
            ASSERT_EQ(all.back(), static_cast<float>(size - 1 + round));
          }
        }
      }
    });
  }
}

// A rank that only gathers to the root may run ahead of it by far.
TEST(GlooCommunicator, HoldsBackARankThatRunsAhead) {
  std::atomic<int> sent{0};
  OnThreads(2, [&](RankCommunicator& comm) {
    const int rounds = 500;
    if (comm.rank() == 0) {
      while (sent < 16) absl::SleepFor(absl::Milliseconds(1));
    }
    for (int round = 0; round < rounds; ++round) {
      const std::vector<float> mine = Integers(comm.rank(), 8, round);
      std::vector<float> all(comm.rank() == 0 ? 16 : 0);
      ASSERT_TRUE(comm.Gather(mine, absl::MakeSpan(all), 0).ok());
      if (comm.rank() == 1) ++sent;
      if (comm.rank() == 0) {
        ASSERT_TRUE(std::equal(all.begin() + 8, all.end(), Integers(1, 8, round).begin()));
      }
    }
  });
}

TEST(GlooCommunicator, WorksBetweenProcesses) {
  for (const int size : {2, 4}) {
    Ranks ranks(
        size,
        [&](RankCommunicator& comm) {
          for (uint32_t round = 0; round < 500; ++round) {
            const size_t count = round % 50 == 0 ? 200'000 : 64 + round;
            std::vector<float> values = Integers(comm.rank(), count, round);
            if (!comm.AllReduceSum(absl::MakeSpan(values)).ok()) return 1;
            if (values != ExpectedSum(size, count, round)) return 2;
          }
          return 0;
        },
        20'000, true);
    for (int rank = 0; rank < size; ++rank) EXPECT_EQ(ranks.Await(rank, absl::Seconds(60)), 0);
  }
}

TEST(GlooCommunicator, SpeaksIpv6Too) {
  const auto adds_up = [](RankCommunicator& comm) {
    float value = 1;
    EXPECT_TRUE(comm.AllReduceSum({&value, 1}).ok());
    EXPECT_EQ(value, 2);
  };
  OnThreads(2, adds_up, 20'000, "::1");
}

TEST(GlooCommunicator, CountsTheWaitForALateRankAsWait) {
  CollectiveStats stats[2];
  std::atomic<pid_t> early{0};
  absl::Duration late;
  OnThreads(2, [&](RankCommunicator& comm) {
    std::vector<float> values(1 << 18, 1.0f);
    ASSERT_TRUE(comm.Barrier().ok());
    comm.ResetStats();
    if (comm.rank() == 0) {
      early = gettid();
      early.notify_one();
    } else {
      early.wait(0);
      // Late by what it takes to see the other wait so many times in a row.
      absl::Time since = absl::Now();
      for (int seen = 0; seen < 1'000;) {
        if (ProcessState(early) == 'R') {
          seen = 0;
        } else if (seen++ == 0) {
          since = absl::Now();
        }
      }
      late = absl::Now() - since;
    }
    ASSERT_TRUE(comm.AllReduceSum(absl::MakeSpan(values)).ok());
    EXPECT_EQ(comm.stats().bytes_sent, values.size() * sizeof(float));
    EXPECT_EQ(comm.stats().count, 1u);
    stats[comm.rank()] = comm.stats();
  });
  EXPECT_GE(absl::Nanoseconds(stats[0].wait_ns), late);
  EXPECT_LT(stats[1].wait_ns, stats[0].wait_ns);
  EXPECT_GT(stats[1].transfer_ns, 0u);
}

}  // namespace
}  // namespace lockstep
