#include "coordinator/api/watched_file.h"

#include <sys/stat.h>

namespace lockstep {

bool WatchedFiles::Changed() {
  std::vector<Stamp> now;
  for (const std::string& path : paths_) {
    struct stat info {};
    Stamp stamp{};
    if (stat(path.c_str(), &info) == 0) {
      stamp = {static_cast<int64_t>(info.st_dev),
               static_cast<int64_t>(info.st_ino),
               info.st_size,
               info.st_mtim.tv_sec,
               info.st_mtim.tv_nsec,
               info.st_ctim.tv_sec,
               info.st_ctim.tv_nsec};
    }
    now.push_back(stamp);
  }
  if (now == seen_) return false;
  seen_ = std::move(now);
  return true;
}

}  // namespace lockstep
