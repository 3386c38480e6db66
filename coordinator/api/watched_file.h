// Whether files have changed since they were last read: by identity, size and
// times, so that a file written in place, one renamed over it and a link that
// points elsewhere are all seen. A look costs a microsecond. Not thread-safe.
#ifndef LOCKSTEP_COORDINATOR_API_WATCHED_FILE_H_
#define LOCKSTEP_COORDINATOR_API_WATCHED_FILE_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace lockstep {

class WatchedFiles {
 public:
  explicit WatchedFiles(std::vector<std::string> paths) : paths_(std::move(paths)) {}

  // True the first time, and once after each change.
  bool Changed();

 private:
  using Stamp = std::array<int64_t, 7>;  // all zero: no such file

  const std::vector<std::string> paths_;
  std::vector<Stamp> seen_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_WATCHED_FILE_H_
