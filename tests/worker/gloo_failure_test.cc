// How a gloo communicator ends: peers that die, stop, stray or are none, and Abort.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/fakes/process_state.h"
#include "tests/worker/gloo_ranks.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/comm/memory_exchange.h"

namespace lockstep {
namespace {

using gloo_testing::kAtOnce;
using gloo_testing::OnThreads;
using gloo_testing::Options;
using gloo_testing::Ranks;
using ::testing::HasSubstr;

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
    MemoryExchange exchange;
    std::vector<std::unique_ptr<RankCommunicator>> comms;
    std::vector<std::thread> joins;
    for (int rank = 0; rank < 2; ++rank) comms.push_back(MakeGlooCommunicator(Options(rank, 2)));
    for (auto& comm : comms) {
      joins.emplace_back([&] { ASSERT_TRUE(comm->Join(exchange).ok()); });
    }
    for (std::thread& join : joins) join.join();
    std::atomic<pid_t> entered{0};
    absl::Status status;
    std::thread waiting([&] {
      std::vector<float> values(count, 1.0f);
      entered = gettid();
      entered.notify_one();
      status = comms[0]->AllReduceSum(absl::MakeSpan(values));
    });
    entered.wait(0);
    // Until it waits, or has ended without.
    while (ProcessState(entered) == 'R') std::this_thread::yield();
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
  MemoryExchange exchange;
  auto comm = MakeGlooCommunicator(Options(0, 2));
  absl::Status status;
  std::thread joining([&] { status = comm->Join(exchange); });
  comm->Abort();
  exchange.Cancel();
  joining.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
}

TEST(GlooCommunicator, AbortEndsAJoinThatWaitsForAPeerToConnect) {
  MemoryExchange exchange;
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
  MemoryExchange exchange;
  ASSERT_TRUE(exchange.Publish("rank/1", "short").ok());
  auto comm = MakeGlooCommunicator(Options(0, 2));
  const absl::Status status = comm->Join(exchange);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
}

TEST(GlooCommunicator, RefusesAnotherGroupsGreeting) {
  MemoryExchange exchange;
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
    MemoryExchange exchange;
    const absl::Status status = MakeGlooCommunicator(options)->Join(exchange);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(address));
    EXPECT_THAT(std::string(status.message()), HasSubstr("--comm-address"));
  }
}

TEST(GlooCommunicator, SurvivesAddressesThatAreNone) {
  std::mt19937 random(7);
  for (int i = 0; i < 20; ++i) {
    MemoryExchange exchange;
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

}  // namespace
}  // namespace lockstep
