// Ranks of a gloo communicator: threads of the test, or processes that it may kill.
#ifndef LOCKSTEP_TESTS_WORKER_GLOO_RANKS_H_
#define LOCKSTEP_TESTS_WORKER_GLOO_RANKS_H_

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <functional>
#include <latch>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/fakes/exchanges.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/comm/memory_exchange.h"

namespace lockstep::gloo_testing {

inline CommunicatorOptions Options(int rank, int size, int64_t max_skew_ms = 20'000) {
  CommunicatorOptions options;
  options.id = "test/e1";
  options.rank = rank;
  options.size = size;
  options.bind_address = "127.0.0.1";
  options.max_skew_ms = max_skew_ms;
  return options;
}

// On a busy machine; a peer that does not come is waited for ten times as long.
inline constexpr absl::Duration kAtOnce = absl::Seconds(2);

// Runs body(communicator) on `size` ranks, one thread each.
inline void OnThreads(int size, const std::function<void(RankCommunicator&)>& body,
                      int64_t max_skew_ms = 20'000, const std::string& bind_address = "127.0.0.1") {
  MemoryExchange exchange;
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

}  // namespace lockstep::gloo_testing

#endif  // LOCKSTEP_TESTS_WORKER_GLOO_RANKS_H_
