#include "worker/nvml.h"

#include <chrono>
#include <cstdlib>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using worker::v1::DeviceStats;

absl::StatusOr<std::unique_ptr<NvmlSampler>> StartFake(const char* mode,
                                                       const std::string& uuid = "GPU-1") {
  setenv("FAKE_NVML", mode, /*overwrite=*/1);
  return NvmlSampler::Start(uuid, {.library = LOCKSTEP_FAKE_NVML, .interval_ms = 1});
}

// The next sample for which `wanted` holds.
DeviceStats Await(NvmlSampler* sampler, bool (*wanted)(const DeviceStats&)) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::chrono::steady_clock::now() < until) {
    const std::optional<DeviceStats> stats = sampler->Take();
    if (stats.has_value() && wanted(*stats)) return *stats;
    std::this_thread::yield();
  }
  ADD_FAILURE() << "no such sample";
  return {};
}

TEST(NvmlTest, SaysWhatTheDriverSays) {
  auto sampler = StartFake("whole");
  ASSERT_TRUE(sampler.ok()) << sampler.status();
  const DeviceStats stats =
      Await(sampler->get(), [](const DeviceStats& s) { return s.has_sm_active(); });
  EXPECT_FLOAT_EQ(stats.sm_active(), 0.875f);
  EXPECT_FLOAT_EQ(stats.dram_active(), 0.625f);
  EXPECT_EQ(stats.nvlink_tx_bytes_per_second(), 1024u << 20);
  EXPECT_FALSE(stats.has_nvlink_rx_bytes_per_second());
  EXPECT_EQ(stats.memory_used_bytes(), 7ull << 30);
  EXPECT_EQ((*sampler)->free_bytes_at_start(), int64_t{130} << 30);
  EXPECT_EQ(stats.sm_clock_mhz(), 1980u);
  EXPECT_EQ(stats.memory_clock_mhz(), 3201u);
  EXPECT_FLOAT_EQ(stats.power_watts(), 512.5f);
  EXPECT_EQ(stats.temperature_celsius(), 61u);
  EXPECT_EQ(stats.throttle_reasons(), 4u);
}

TEST(NvmlTest, RatesNeedTwoSamplesAndAreAbsentBefore) {
  setenv("FAKE_NVML", "whole", 1);
  auto sampler =
      NvmlSampler::Start("GPU-1", {.library = LOCKSTEP_FAKE_NVML, .interval_ms = 3'600'000});
  ASSERT_TRUE(sampler.ok());
  const DeviceStats first = Await(sampler->get(), [](const DeviceStats&) { return true; });
  EXPECT_FALSE(first.has_sm_active());
  EXPECT_TRUE(first.has_memory_used_bytes());
  EXPECT_FALSE((*sampler)->Take().has_value());  // once
}

TEST(NvmlTest, LeavesOutWhatTheDriverDoesNotGive) {
  auto sampler = StartFake("nogpm");
  ASSERT_TRUE(sampler.ok());
  for (int i = 0; i < 3; ++i) {
    const DeviceStats stats = Await(sampler->get(), [](const DeviceStats&) { return true; });
    EXPECT_FALSE(stats.has_sm_active());
    EXPECT_FALSE(stats.has_dram_active());
    EXPECT_FALSE(stats.has_power_watts());
    EXPECT_TRUE(stats.has_temperature_celsius());
  }
}

TEST(NvmlTest, ADriverThatAnswersNothingGivesEmptySamples) {
  auto sampler = StartFake("broken");
  ASSERT_TRUE(sampler.ok());
  const DeviceStats stats = Await(sampler->get(), [](const DeviceStats&) { return true; });
  EXPECT_EQ(stats.ByteSizeLong(), 0u);
  EXPECT_EQ((*sampler)->free_bytes_at_start(), 0);
}

TEST(NvmlTest, NamesWhatIsMissing) {
  const auto no_gpu = StartFake("whole", "GPU-2");
  EXPECT_TRUE(absl::IsNotFound(no_gpu.status()));
  EXPECT_THAT(std::string(no_gpu.status().message()), HasSubstr("GPU-2: no such GPU"));
  const auto no_library = NvmlSampler::Start("GPU-1", {.library = "libno-such-nvml.so"});
  EXPECT_TRUE(absl::IsNotFound(no_library.status()));
  EXPECT_THAT(std::string(no_library.status().message()), HasSubstr("libno-such-nvml.so"));
}

}  // namespace
}  // namespace lockstep
