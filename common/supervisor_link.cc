#include "common/supervisor_link.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/strings/numbers.h"

namespace lockstep {

SupervisorLink::SupervisorLink() {
  const char* const value = std::getenv(kSupervisorFdVariable);
  int fd = -1;
  struct stat about;
  if (value == nullptr || !absl::SimpleAtoi(value, &fd) || fd <= STDERR_FILENO) return;
  // A variable that somebody else left behind may name anything.
  if (fstat(fd, &about) != 0 || !S_ISFIFO(about.st_mode)) return;
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  fd_ = fd;
}

SupervisorLink::~SupervisorLink() {
  if (fd_ >= 0) close(fd_);
}

void SupervisorLink::Tell(SupervisorNote note) const {
  if (fd_ < 0) return;
  const char byte = static_cast<char>(note);
  [[maybe_unused]] const ssize_t written = write(fd_, &byte, 1);
}

}  // namespace lockstep
