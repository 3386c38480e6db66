#include "common/service_manager.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "absl/strings/numbers.h"

namespace lockstep {
namespace {

// A manager that does not read must not hold this process up.
constexpr timeval kSendTimeout = {1, 0};

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string Take(const char* variable) {
  const char* const value = std::getenv(variable);
  std::string taken = value == nullptr ? "" : value;
  unsetenv(variable);
  return taken;
}

}  // namespace

ServiceManager::ServiceManager() {
  address_ = Take("NOTIFY_SOCKET");
  const std::string watchdog_us = Take("WATCHDOG_USEC");
  const std::string watchdog_pid = Take("WATCHDOG_PID");
  if (address_.empty() || (address_[0] != '/' && address_[0] != '@') ||
      address_.size() > sizeof(sockaddr_un::sun_path)) {
    return;
  }
  if (address_[0] == '@') address_[0] = '\0';
  fd_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd_ < 0) return;
  setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &kSendTimeout, sizeof(kSendTimeout));
  int64_t microseconds = 0, pid = 0;
  if (!absl::SimpleAtoi(watchdog_us, &microseconds) || microseconds <= 0) return;
  // The watchdog of another process: an ancestor that did not take it away.
  if (!watchdog_pid.empty() && (!absl::SimpleAtoi(watchdog_pid, &pid) || pid != getpid())) return;
  // A third of what is allowed, so that one late beat does no harm.
  beat_every_ms_ = std::max<int64_t>(1, microseconds / 3'000);
}

ServiceManager::~ServiceManager() {
  if (fd_ >= 0) close(fd_);
}

void ServiceManager::Ready() {
  if (!said_ready_.exchange(true)) Send("READY=1\nSTATUS=ready");
}

void ServiceManager::Stopping() {
  if (!said_stopping_.exchange(true)) Send("STOPPING=1\nSTATUS=ending");
}

void ServiceManager::Status(std::string_view line) const {
  Send("STATUS=" + std::string(line.substr(0, line.find('\n'))));
}

void ServiceManager::Beat() {
  if (MsUntilBeat() != 0) return;
  last_beat_ms_ = NowMs();
  Send("WATCHDOG=1");
}

int64_t ServiceManager::MsUntilBeat() const {
  if (beat_every_ms_ == 0) return -1;
  return std::max<int64_t>(0, last_beat_ms_ + beat_every_ms_ - NowMs());
}

void ServiceManager::Send(std::string_view state) const {
  if (fd_ < 0) return;
  sockaddr_un to = {};
  to.sun_family = AF_UNIX;
  std::memcpy(to.sun_path, address_.data(), address_.size());
  const socklen_t length =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address_.size());
  [[maybe_unused]] const ssize_t sent = sendto(fd_, state.data(), state.size(), MSG_NOSIGNAL,
                                               reinterpret_cast<const sockaddr*>(&to), length);
}

}  // namespace lockstep
