// How much load: a short form in the ordinary test run, a long one on request.
#ifndef LOCKSTEP_TESTS_LOAD_LOAD_OPTIONS_H_
#define LOCKSTEP_TESTS_LOAD_LOAD_OPTIONS_H_

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

inline double LoadSetting(const char* variable, double otherwise) {
  const char* const value = std::getenv(variable);
  return value == nullptr ? otherwise : std::atof(value);
}
inline int LoadStreams(int otherwise) {
  return static_cast<int>(LoadSetting("LOCKSTEP_LOAD_STREAMS", otherwise));
}
inline double LoadSeconds(double otherwise) {
  return LoadSetting("LOCKSTEP_LOAD_SECONDS", otherwise);
}

// Bytes from a process's status: "VmRSS:" or, of the peak, "VmHWM:".
inline size_t ProcessMemory(pid_t pid, const std::string& what) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, what)) return std::stoul(line.substr(what.size())) * 1024;
  }
  return 0;
}

// Of all threads, since the process began; in whole ticks of the kernel.
inline double ProcessCpuSeconds(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string stat;
  std::getline(file, stat);
  // Behind the name, which may have blanks: state, ten numbers, user and system time.
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
  std::string skipped;
  double user = 0, system = 0;
  for (int i = 0; i < 11; ++i) fields >> skipped;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_LOAD_LOAD_OPTIONS_H_
