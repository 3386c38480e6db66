#include "worker/comm/gloo_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <latch>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "model/memory_model.h"
#include "tests/fakes/exchanges.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

CommunicatorOptions Options(int rank, int size, int64_t max_skew_ms = 20'000) {
  CommunicatorOptions options;
  options.id = "test/e1";
  options.rank = rank;
  options.size = size;
  options.bind_address = "127.0.0.1";
  options.max_skew_ms = max_skew_ms;
  return options;
}

// On a busy machine; a peer that does not come is waited for ten times as long.
constexpr absl::Duration kAtOnce = absl::Seconds(2);

// Runs body(communicator) on `size` ranks, one thread each.
void OnThreads(int size, const std::function<void(RankCommunicator&)>& body,
               int64_t max_skew_ms = 20'000, const std::string& bind_address = "127.0.0.1") {
  fakes::MemoryExchange exchange;
  std::vector<std::thread> threads;
  // A communicator that is dropped resets its connections, so none is before
  // all are done.
  std::latch done(size);
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      CommunicatorOptions options = Options(rank, size, max_skew_ms);
      options.bind_address = bind_address;
      auto comm = MakeGlooCommunicator(options);
      const absl::Status joined = comm->Join(exchange);
      EXPECT_TRUE(joined.ok()) << joined;
      if (joined.ok()) body(*comm);
      if (::testing::Test::HasFailure()) comm->Abort();
      done.arrive_and_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Forks `size` ranks; each exits with body's value. Killed after a bound.
class Ranks {
 public:
  // `together`: none drops its communicator before all are done.
  Ranks(int size, const std::function<int(RankCommunicator&)>& body, int64_t max_skew_ms,
        bool together = false) {
    folder_ = std::filesystem::temp_directory_path() /
              ("lockstep_comm_" + std::to_string(getpid()) + "_" + std::to_string(counter_++));
    std::filesystem::create_directories(folder_);
    for (int rank = 0; rank < size; ++rank) {
      const pid_t pid = fork();
      if (pid == 0) {
        fakes::FileExchange exchange(folder_);
        auto comm = MakeGlooCommunicator(Options(rank, size, max_skew_ms));
        const bool joined = comm->Join(exchange).ok();
        if (joined) (void)exchange.Publish("joined" + std::to_string(rank), "");
        const int code = joined ? body(*comm) : 99;
        (void)exchange.Publish("done" + std::to_string(rank), "");
        for (int other = 0; together && other < size; ++other) {
          (void)exchange.Await("done" + std::to_string(other));
        }
        comm.reset();
        _exit(code);
      }
      pids_.push_back(pid);
    }
  }
  ~Ranks() {
    for (const pid_t pid : pids_) {
      if (pid > 0) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
    }
    std::filesystem::remove_all(folder_);
  }
  void AwaitJoined() {
    fakes::FileExchange exchange(folder_);
    for (size_t i = 0; i < pids_.size(); ++i) {
      ASSERT_TRUE(exchange.Await("joined" + std::to_string(i)).ok());
    }
  }
  pid_t pid(int rank) const { return pids_[rank]; }
  // The exit code, -signal, or -1000 when it did not end within `bound`.
  int Await(int rank, absl::Duration bound) {
    const absl::Time deadline = absl::Now() + bound;
    int status = 0;
    while (waitpid(pids_[rank], &status, WNOHANG) == 0) {
      if (absl::Now() > deadline) return -1000;
      absl::SleepFor(absl::Milliseconds(1));
    }
    pids_[rank] = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  static inline int counter_ = 0;
  std::string folder_;
  std::vector<pid_t> pids_;
};

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

int ReduceForEver(RankCommunicator& comm, absl::StatusCode expected) {
  std::vector<float> values(1024, 1.0f);
  absl::Status status;
  while (status.ok()) status = comm.AllReduceSum(absl::MakeSpan(values));
  if (!comm.AllReduceSum(absl::MakeSpan(values)).ok()) {
    return status.code() == expected ? 0 : static_cast<int>(status.code());
  }
  return 50;
}

TEST(GlooCommunicator, FailsOnEveryRankWhenAPeerIsKilled) {
  Ranks ranks(
      4, [](RankCommunicator& comm) { return ReduceForEver(comm, absl::StatusCode::kUnavailable); },
      20'000);
  ranks.AwaitJoined();
  kill(ranks.pid(2), SIGKILL);
  EXPECT_EQ(ranks.Await(2, absl::Seconds(5)), -SIGKILL);
  for (const int rank : {0, 1, 3}) EXPECT_EQ(ranks.Await(rank, absl::Seconds(1)), 0) << rank;
}

TEST(GlooCommunicator, FailsWithinTheSkewWhenAPeerIsStopped) {
  Ranks ranks(
      2,
      [](RankCommunicator& comm) {
        return ReduceForEver(comm, absl::StatusCode::kDeadlineExceeded);
      },
      300);
  ranks.AwaitJoined();
  kill(ranks.pid(1), SIGSTOP);
  EXPECT_EQ(ranks.Await(0, absl::Seconds(3)), 0);
}

TEST(GlooCommunicator, FailsWithinTheSkewWhenARankSkipsACollective) {
  OnThreads(
      3,
      [](RankCommunicator& comm) {
        std::vector<float> values(256, 1.0f);
        for (int i = 0; i < 10; ++i) {
          if (comm.rank() == 1 && i == 9) break;  // the last one of a step
          ASSERT_TRUE(comm.AllReduceSum(absl::MakeSpan(values)).ok() || i == 9);
        }
        if (comm.rank() == 1) {
          // It waits for a plan that never comes, until the others give up.
          EXPECT_FALSE(comm.Barrier().ok());
        } else {
          EXPECT_FALSE(comm.AllReduceSum(absl::MakeSpan(values)).ok());
        }
      },
      300);
}

TEST(GlooCommunicator, NamesTheRankThatIsAtAnotherCollective) {
  std::atomic<int> named{0};
  OnThreads(2, [&](RankCommunicator& comm) {
    std::vector<float> values(256, 1.0f);
    absl::Status status = comm.rank() == 0 ? comm.AllReduceSum(absl::MakeSpan(values))
                                           : comm.AllReduceSum(absl::MakeSpan(values).first(16));
    EXPECT_FALSE(status.ok());
    // The second to notice may only see the connection close.
    if (status.code() == absl::StatusCode::kFailedPrecondition) {
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr("rank " + std::to_string(1 - comm.rank()) + ": is at all-reduce 1"));
      ++named;
    }
  });
  EXPECT_GE(named.load(), 1);
}

TEST(GlooCommunicator, AbortEndsACollectiveUnderWayAtOnce) {
  for (const size_t count : {16u, 1u << 20}) {
    fakes::MemoryExchange exchange;
    std::vector<std::unique_ptr<RankCommunicator>> comms;
    std::vector<std::thread> joins;
    for (int rank = 0; rank < 2; ++rank) comms.push_back(MakeGlooCommunicator(Options(rank, 2)));
    for (auto& comm : comms) {
      joins.emplace_back([&] { ASSERT_TRUE(comm->Join(exchange).ok()); });
    }
    for (std::thread& join : joins) join.join();
    std::atomic<bool> entered{false};
    absl::Status status;
    std::thread waiting([&] {
      std::vector<float> values(count, 1.0f);
      entered = true;
      status = comms[0]->AllReduceSum(absl::MakeSpan(values));
    });
    while (!entered) absl::SleepFor(absl::Milliseconds(1));
    absl::SleepFor(absl::Milliseconds(20));  // most likely it blocks by now; right either way
    const absl::Time start = absl::Now();
    comms[0]->Abort();
    waiting.join();
    EXPECT_LT(absl::Now() - start, kAtOnce);
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_EQ(comms[0]->Barrier().code(), absl::StatusCode::kAborted);
    // The peer learns of it as well.
    EXPECT_FALSE(comms[1]->Barrier().ok());
  }
}

TEST(GlooCommunicator, AbortEndsAJoinUnderWay) {
  fakes::MemoryExchange exchange;
  auto comm = MakeGlooCommunicator(Options(0, 2));
  absl::Status status;
  std::thread joining([&] { status = comm->Join(exchange); });
  comm->Abort();
  exchange.Cancel();
  joining.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
}

TEST(GlooCommunicator, AbortEndsAJoinThatWaitsForAPeerToConnect) {
  fakes::MemoryExchange exchange;
  auto comm = MakeGlooCommunicator(Options(0, 2));
  std::thread peer([&] {
    // Publishes an address and never connects to the other's.
    auto other = MakeGlooCommunicator(Options(1, 2));
    absl::StatusOr<std::string> address = exchange.Await("rank/0");
    ASSERT_TRUE(address.ok());
    // Port 65535 of an address that sorts above: rank 0 stays the listening side.
    std::string mine = *address;
    mine[2] = mine[3] = static_cast<char>(0xff);
    ASSERT_TRUE(exchange.Publish("rank/1", mine).ok());
  });
  absl::Status status;
  std::thread joining([&] { status = comm->Join(exchange); });
  peer.join();
  const absl::Time start = absl::Now();
  comm->Abort();
  joining.join();
  EXPECT_LT(absl::Now() - start, kAtOnce);
  EXPECT_FALSE(status.ok());
}

TEST(GlooCommunicator, RefusesAnAddressListOfAnotherLength) {
  fakes::MemoryExchange exchange;
  ASSERT_TRUE(exchange.Publish("rank/1", "short").ok());
  auto comm = MakeGlooCommunicator(Options(0, 2));
  const absl::Status status = comm->Join(exchange);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
}

TEST(GlooCommunicator, RefusesAnotherGroupsGreeting) {
  fakes::MemoryExchange exchange;
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      CommunicatorOptions options = Options(rank, 2);
      options.id = "test/e" + std::to_string(rank);
      auto comm = MakeGlooCommunicator(options);
      if (!comm->Join(exchange).ok()) ++failed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(failed.load(), 1);
}

TEST(GlooCommunicator, NamesABindAddressThatIsNotOurs) {
  for (const char* address : {"203.0.113.7", "0.0.0.0", "::", "no-such-host.invalid"}) {
    CommunicatorOptions options = Options(0, 2);
    options.bind_address = address;
    fakes::MemoryExchange exchange;
    const absl::Status status = MakeGlooCommunicator(options)->Join(exchange);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(address));
    EXPECT_THAT(std::string(status.message()), HasSubstr("--comm-address"));
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

// Whatever a peer publishes is an error of this rank's, no more.
TEST(GlooCommunicator, SurvivesAddressesThatAreNone) {
  std::mt19937 random(7);
  for (int i = 0; i < 20; ++i) {
    fakes::MemoryExchange exchange;
    auto comm = MakeGlooCommunicator(Options(0, 2, 50));
    std::thread liar([&] {
      absl::StatusOr<std::string> theirs = exchange.Await("rank/0");
      ASSERT_TRUE(theirs.ok());
      for (char& c : *theirs) c = static_cast<char>(random());
      if (i == 0) theirs->assign(theirs->size(), '\0');
      ASSERT_TRUE(exchange.Publish("rank/1", *theirs).ok());
    });
    EXPECT_FALSE(comm->Join(exchange).ok());
    liar.join();
  }
}

TEST(GlooCommunicator, CountsTheWaitForALateRankAsWait) {
  CollectiveStats stats[2];
  OnThreads(2, [&](RankCommunicator& comm) {
    ASSERT_TRUE(comm.Barrier().ok());
    comm.ResetStats();
    if (comm.rank() == 1) absl::SleepFor(absl::Milliseconds(200));  // the skew to be measured
    std::vector<float> values(1 << 18, 1.0f);
    ASSERT_TRUE(comm.AllReduceSum(absl::MakeSpan(values)).ok());
    EXPECT_EQ(comm.stats().bytes_sent, values.size() * sizeof(float));
    EXPECT_EQ(comm.stats().count, 1u);
    stats[comm.rank()] = comm.stats();
  });
  EXPECT_GT(stats[0].wait_ns, 100'000'000u);
  EXPECT_LT(stats[1].wait_ns, stats[0].wait_ns);
  EXPECT_GT(stats[1].transfer_ns, 0u);
}

}  // namespace
}  // namespace lockstep
