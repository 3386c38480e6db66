#include "worker/device_info.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <random>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace lockstep {
namespace {

// The text after the colon of the first line that starts with `key`.
std::optional<std::string> Field(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const size_t colon = line.find(':');
    if (!absl::StartsWith(line, key) || colon == std::string::npos) continue;
    return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return std::nullopt;
}

uint64_t Kilobytes(const std::string& path, const std::string& key) {
  const std::optional<std::string> text = Field(path, key);
  uint64_t value = 0;
  if (!text || !absl::SimpleAtoi(text->substr(0, text->find(' ')), &value)) return 0;
  return value << 10;
}

std::optional<uint64_t> Number(const std::string& path) {
  std::ifstream in(path);
  std::string text;
  uint64_t value = 0;
  if (!(in >> text) || !absl::SimpleAtoi(text, &value)) return std::nullopt;  // "max": no limit
  return value;
}

// What cgroup v2 allows this process: the tightest limit on the way to the root.
void ApplyCgroupLimits(const std::string& root, DeviceInfo* info) {
  std::optional<std::string> group = Field(root + "/proc/self/cgroup", "0:");
  if (!group) return;
  std::string path = group->substr(std::min(group->size(), group->find('/')));
  while (true) {
    const std::string folder = absl::StrCat(root, "/sys/fs/cgroup", path == "/" ? "" : path, "/");
    const std::optional<uint64_t> limit = Number(folder + "memory.max");
    if (limit) {
      const uint64_t used = Number(folder + "memory.current").value_or(0);
      // Page cache is charged, too, but given back under pressure.
      std::ifstream stat(folder + "memory.stat");
      uint64_t cache = 0;
      for (std::string name, value; stat >> name >> value;) {
        if (name == "inactive_file" || name == "active_file") {
          uint64_t bytes = 0;
          if (absl::SimpleAtoi(value, &bytes)) cache += bytes;
        }
      }
      const uint64_t held = used > cache ? used - cache : 0;
      info->memory_total_bytes = std::min(info->memory_total_bytes, *limit);
      info->memory_free_bytes =
          std::min(info->memory_free_bytes, *limit > held ? *limit - held : 0);
    }
    if (path.empty() || path == "/") return;
    path.resize(path.rfind('/'));
  }
}

}  // namespace

DeviceInfo ReadDeviceInfo(const std::string& root) {
  DeviceInfo info;
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) == 0) info.host = name;
  info.processor = Field(root + "/proc/cpuinfo", "model name").value_or("cpu");
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
    info.num_threads = static_cast<uint32_t>(std::max(1, CPU_COUNT(&mask)));
  }
  info.memory_total_bytes = Kilobytes(root + "/proc/meminfo", "MemTotal");
  info.memory_free_bytes = Kilobytes(root + "/proc/meminfo", "MemAvailable");
  ApplyCgroupLimits(root, &info);
  return info;
}

std::string NewInstanceName() {
  std::random_device random;
  const uint64_t bits = (uint64_t{random()} << 32) | random();
  return absl::StrCat(absl::Hex(bits, absl::kZeroPad16));
}

}  // namespace lockstep
