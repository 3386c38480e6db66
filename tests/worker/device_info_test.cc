#include "worker/device_info.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "tests/fakes/temp_dir.h"

namespace lockstep {
namespace {

class DeviceInfoTest : public ::testing::Test {
 protected:
  DeviceInfoTest() {
    Write("/proc/cpuinfo", "processor\t: 0\nmodel name\t: Abacus 9000\n");
    Write("/proc/meminfo", "MemTotal:  1048576 kB\nMemFree: 10 kB\nMemAvailable:  524288 kB\n");
  }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path full = root_.path() + path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }
  DeviceInfo Read() const { return ReadDeviceInfo(root_.path()); }

  const TempDir root_;
};

TEST_F(DeviceInfoTest, ReadsTheHostsMemoryWithoutAnyLimit) {
  const DeviceInfo info = Read();
  EXPECT_EQ(info.processor, "Abacus 9000");
  EXPECT_EQ(info.memory_total_bytes, uint64_t{1} << 30);
  EXPECT_EQ(info.memory_free_bytes, uint64_t{1} << 29);
  EXPECT_GE(info.num_threads, 1u);
  EXPECT_FALSE(info.host.empty());
}

TEST_F(DeviceInfoTest, TheTightestContainerLimitCountsAndPageCacheIsFree) {
  Write("/proc/self/cgroup", "0::/pod/worker\n");
  Write("/sys/fs/cgroup/pod/memory.max", "400000000\n");
  Write("/sys/fs/cgroup/pod/memory.current", "100000000\n");
  Write("/sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 30000000\nactive_file 20000000\n");
  Write("/sys/fs/cgroup/pod/worker/memory.max", "max\n");
  const DeviceInfo info = Read();
  EXPECT_EQ(info.memory_total_bytes, 400'000'000u);
  EXPECT_EQ(info.memory_free_bytes, 350'000'000u);
}

TEST_F(DeviceInfoTest, TheTightestOfNestedLimitsCountsWhereverItIs) {
  Write("/proc/self/cgroup", "0::/pod/worker\n");
  const std::pair<const char*, const char*> orders[] = {{"300000000\n", "400000000\n"},
                                                        {"400000000\n", "300000000\n"}};
  for (const auto& [outer, inner] : orders) {
    Write("/sys/fs/cgroup/pod/memory.max", outer);
    Write("/sys/fs/cgroup/pod/worker/memory.max", inner);
    const DeviceInfo info = Read();
    EXPECT_EQ(info.memory_total_bytes, 300'000'000u);
    EXPECT_EQ(info.memory_free_bytes, 300'000'000u);
  }
}

TEST_F(DeviceInfoTest, ALimitAboveTheHostsMemoryIsNone) {
  Write("/proc/self/cgroup", "0::/pod\n");
  Write("/sys/fs/cgroup/pod/memory.max", "9000000000\n");
  const DeviceInfo info = Read();
  EXPECT_EQ(info.memory_total_bytes, uint64_t{1} << 30);
  EXPECT_EQ(info.memory_free_bytes, uint64_t{1} << 29);
}

TEST_F(DeviceInfoTest, SurvivesNonsense) {
  Write("/proc/self/cgroup", "nothing\n0\n0:\n");
  Write("/proc/meminfo", "MemTotal: many kB\n");
  EXPECT_EQ(Read().memory_total_bytes, 0u);
}

TEST(InstanceName, IsNewEveryTime) { EXPECT_NE(NewInstanceName(), NewInstanceName()); }

}  // namespace
}  // namespace lockstep
