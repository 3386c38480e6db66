#include "worker/thread_pool.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace lockstep {
namespace {

TEST(ThreadPoolTest, RunsEveryIndexOnce) {
  for (const int size : {1, 2, 3, 8}) {
    ThreadPool pool(size);
    for (const int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(count);
      pool.ParallelFor(count, [&](int64_t i, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, size);
        runs[i].fetch_add(1);
      });
      for (int64_t i = 0; i < count; ++i) EXPECT_EQ(runs[i].load(), 1) << i << " of " << count;
    }
  }
}

TEST(ThreadPoolTest, NoTwoIndicesShareAThreadAtOnce) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> inside(4);
  for (int loop = 0; loop < 50; ++loop) {
    pool.ParallelFor(64, [&](int64_t, int thread) {
      EXPECT_EQ(inside[thread].fetch_add(1), 0);
      std::this_thread::yield();
      inside[thread].fetch_sub(1);
    });
  }
}

TEST(ThreadPoolTest, EffectsOfALoopAreVisibleAfterIt) {
  ThreadPool pool(3);
  std::vector<int64_t> values(257, 0);  // plain memory: a race is ThreadSanitizer's to find
  for (int64_t loop = 1; loop <= 3000; ++loop) {
    pool.ParallelFor(static_cast<int64_t>(values.size()), [&](int64_t i, int) { values[i] += i; });
    ASSERT_EQ(values[256], 256 * loop);
    ASSERT_EQ(values[1], loop);
  }
}

TEST(ThreadPoolTest, SleepingHelpersWakeForTheNextLoop) {
  ThreadPool pool(2);
  for (int loop = 0; loop < 20; ++loop) {
    std::atomic<int> runs{0};
    // Each index waits until both are being run: it takes the helper too.
    pool.ParallelFor(2, [&](int64_t, int) {
      runs.fetch_add(1);
      while (runs.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(runs.load(), 2);
    std::this_thread::yield();
  }
}

TEST(ThreadPoolTest, EndsWithHelpersAsleepOrAwake) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(4);
    if (i % 2 == 0) pool.ParallelFor(8, [](int64_t, int) {});
  }
}

// Whether every thread but this one sleeps, by /proc.
bool OthersSleep() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == std::to_string(gettid())) continue;
    std::ifstream file(task.path() / "stat");
    std::string stat((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const size_t name_end = stat.rfind(')');
    if (name_end == std::string::npos || stat.substr(name_end, 3) != ") S") return false;
  }
  return true;
}

TEST(ThreadPoolTest, IdleHelpersSleep) {
  ThreadPool pool(4);
  pool.ParallelFor(64, [](int64_t, int) {});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!OthersSleep()) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "a helper still runs";
    std::this_thread::yield();
  }
}

}  // namespace
}  // namespace lockstep
