#include "common/process_events.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

absl::StatusOr<ProcessEvents> ProcessEvents::Install() {
  signal(SIGPIPE, SIG_IGN);
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ProcessEvents events(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK),
                       eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (events.signal_fd_ < 0 || events.wake_fd_ < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("signalfd: ", strerror(errno)));
  }
  return events;
}

ProcessEvents::ProcessEvents(ProcessEvents&& other) noexcept
    : signal_fd_(std::exchange(other.signal_fd_, -1)),
      wake_fd_(std::exchange(other.wake_fd_, -1)) {}

ProcessEvents::~ProcessEvents() {
  if (signal_fd_ >= 0) close(signal_fd_);
  if (wake_fd_ >= 0) close(wake_fd_);
}

void ProcessEvents::Wake() const {
  const uint64_t one = 1;
  // Fails only when the counter is full: then a wake is pending anyway.
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
}

ProcessEvents::Event ProcessEvents::Wait(int64_t timeout_ms) const {
  for (;;) {
    pollfd fds[] = {{signal_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    const int found = poll(fds, 2, static_cast<int>(std::min<int64_t>(timeout_ms, INT_MAX)));
    if (found == 0) return Event::kTimeout;
    if (found < 0) continue;  // EINTR
    signalfd_siginfo info;
    if (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) return Event::kTerminate;
    uint64_t count;
    if (read(wake_fd_, &count, sizeof(count)) == sizeof(count)) return Event::kWoken;
  }
}

bool DieWithParent() {
  const pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // It may have ended in between; orphans are adopted by another process.
  return getppid() == parent;
}

}  // namespace lockstep
