#include "worker/load_progress.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace lockstep {
namespace {

TEST(LoadProgress, SaysHowFarAndHowFast) {
  EXPECT_EQ(LoadProgressReport::Line(1, 1u << 29, uint64_t{1} << 30, 1.0, true),
            "rank 1 [###############               ] 512.0 MiB of 1.00 GiB, 0.5 GB/s");
  EXPECT_EQ(LoadProgressReport::Line(0, 0, 1 << 20, 0, false), "rank 0 0.0 MiB of 1.0 MiB");
  EXPECT_EQ(LoadProgressReport::Line(0, 0, 0, 0, true),
            "rank 0 [##############################] 0.0 MiB of 0.0 MiB");
  // More than all of it must not overrun the bar.
  EXPECT_EQ(LoadProgressReport::Line(0, 3 << 20, 1 << 20, 0, true),
            "rank 0 [##############################] 3.0 MiB of 1.0 MiB");
}

TEST(LoadProgress, SendsFewMessagesAndTheLastOneOnce) {
  std::vector<uint64_t> sent;
  LoadProgressReport report(0, false, [&](uint64_t done, uint64_t) { sent.push_back(done); });
  for (uint64_t done = 0; done <= 100'000; ++done) report.Update(done, 100'000);
  report.Update(100'000, 100'000);
  ASSERT_FALSE(sent.empty());
  EXPECT_EQ(sent.back(), 100'000u);
  EXPECT_LT(sent.size(), 1'000u);
  EXPECT_EQ(std::count(sent.begin(), sent.end(), 100'000u), 1);
}

TEST(LoadProgress, SendsOnTheWay) {
  std::vector<uint64_t> sent;
  LoadProgressReport report(0, false, [&](uint64_t done, uint64_t) { sent.push_back(done); });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (sent.empty() && std::chrono::steady_clock::now() < deadline) report.Update(1, 100);
  report.Update(100, 100);
  EXPECT_EQ(sent, (std::vector<uint64_t>{1, 100}));
}

}  // namespace
}  // namespace lockstep
