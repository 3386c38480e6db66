#include "cli/top/http_get.h"

#include <netdb.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr size_t kMaxAnswerBytes = 64 << 20;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::Status Away(const std::string& address, const std::string& why) {
  return absl::UnavailableError(absl::StrCat(address, ": ", why));
}

absl::StatusOr<std::pair<std::string, std::string>> SplitAddress(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon + 1 == address.size() || colon == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--server ", address, ": expected host:port of the HTTP door"));
  }
  std::string host = address.substr(0, colon);
  if (host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return std::pair(host, address.substr(colon + 1));
}

absl::StatusOr<std::unique_ptr<Socket>> Dial(const std::string& address, int64_t timeout_ms) {
  const auto parts = SplitAddress(address);
  if (!parts.ok()) return parts.status();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int failed = getaddrinfo(parts->first.c_str(), parts->second.c_str(), &hints, &found);
  if (failed != 0) return Away(address, gai_strerror(failed));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  const timeval timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1000};
  int error = 0;
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    auto socket_fd = std::make_unique<Socket>(
        socket(each->ai_family, each->ai_socktype | SOCK_CLOEXEC, each->ai_protocol));
    if (socket_fd->fd() < 0) continue;
    // The send timeout bounds connect as well.
    setsockopt(socket_fd->fd(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(socket_fd->fd(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(socket_fd->fd(), each->ai_addr, each->ai_addrlen) == 0) return socket_fd;
    error = errno;
  }
  return Away(address, strerror(error));
}

absl::StatusOr<std::string> Exchange(const std::string& address, const Socket& socket,
                                     const std::string& request) {
  if (send(socket.fd(), request.data(), request.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(request.size())) {
    return Away(address, strerror(errno));
  }
  std::string answer;
  char buffer[16384];
  for (;;) {
    const ssize_t n = recv(socket.fd(), buffer, sizeof(buffer), 0);
    if (n == 0) return answer;
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Away(address, errno == EAGAIN ? "no answer in time" : strerror(errno));
    answer.append(buffer, static_cast<size_t>(n));
    if (answer.size() > kMaxAnswerBytes) return Away(address, "an answer without end");
  }
}

}  // namespace

absl::StatusOr<std::string> HttpGet(const std::string& address, const std::string& path,
                                    int64_t timeout_ms) {
  const absl::StatusOr<std::unique_ptr<Socket>> socket = Dial(address, timeout_ms);
  if (!socket.ok()) return socket.status();
  absl::StatusOr<std::string> answer = Exchange(
      address, **socket,
      absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: ", address, "\r\nConnection: close\r\n\r\n"));
  if (!answer.ok()) return answer.status();
  const size_t end = answer->find("\r\n\r\n");
  if (answer->rfind("HTTP/1.", 0) != 0 || end == std::string::npos) {
    return Away(address, "no HTTP is spoken here; give the HTTP door's port");
  }
  const std::string head = absl::AsciiStrToLower(answer->substr(0, end));
  if (head.substr(8, 5) != " 200 ") {
    return Away(address, absl::StrCat(path, ": ", answer->substr(9, answer->find("\r\n") - 9)));
  }
  if (head.find("transfer-encoding: chunked") != std::string::npos) {
    return Away(address, absl::StrCat(path, ": a chunked answer, which is no Lockstep server's"));
  }
  return answer->substr(end + 4);
}

}  // namespace lockstep
