#include "cli/private_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// Between making a folder and locking it nobody holds it.
constexpr time_t kYoungSeconds = 10;

// `how`: LOCK_NB, or 0 to wait for whoever looks at it.
int LockFolder(const std::string& path, int how) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -1;
  struct stat about;
  if (fstat(fd, &about) == 0 && about.st_uid == geteuid() && flock(fd, LOCK_EX | how) == 0) {
    return fd;
  }
  close(fd);
  return -1;
}

void RemoveAbandoned(const std::string& prefix) {
  const fs::path pattern(prefix + "-");
  const std::string name = pattern.filename();
  std::error_code ignored;
  for (fs::directory_iterator it(pattern.parent_path(), ignored), end; it != end;
       it.increment(ignored)) {
    if (ignored) return;
    const std::string found = it->path().filename();
    if (found.size() != name.size() + 6 || !absl::StartsWith(found, name)) continue;
    const int lock = LockFolder(it->path(), LOCK_NB);
    if (lock < 0) continue;
    struct stat about;
    if (fstat(lock, &about) == 0 && about.st_mtime + kYoungSeconds < time(nullptr)) {
      fs::remove_all(it->path(), ignored);
    }
    close(lock);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrivateFolder>> PrivateFolder::Make(const std::string& prefix) {
  RemoveAbandoned(prefix);
  std::string pattern = prefix + "-XXXXXX";
  const int lock = mkdtemp(pattern.data()) == nullptr ? -1 : LockFolder(pattern, 0);
  if (lock < 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot make a folder like ", pattern, ": ", strerror(errno)));
  }
  return std::unique_ptr<PrivateFolder>(new PrivateFolder(pattern, lock));
}

PrivateFolder::~PrivateFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  close(lock_);
}

}  // namespace lockstep
