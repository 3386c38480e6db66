#include "coordinator/api/address.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

std::string HostPort(const std::string& host, int port) {
  if (absl::StrContains(host, ':')) return absl::StrCat("[", host, "]:", port);
  return absl::StrCat(host, ":", port);
}

absl::Status CheckCanBind(const std::string& host, int port, const char* flag) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int lookup = getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found);
  if (lookup != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--host: ", host, ": ", gai_strerror(lookup), "; try 127.0.0.1"));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(found, freeaddrinfo);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    return absl::UnavailableError(absl::StrCat(flag, ": no socket: ", std::strerror(errno)));
  }
  // As servers bind: a port whose last connections are fading is free.
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const bool bound = bind(fd, found->ai_addr, found->ai_addrlen) == 0;
  const bool listening = bound && listen(fd, 1) == 0;
  const int error = errno;
  close(fd);
  if (listening) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(flag, " ", port, ": ", HostPort(host, port), ": ", std::strerror(error),
                   error == EADDRINUSE ? "; stop the other server or choose another port"
                   : error == EACCES   ? "; choose a port above 1023"
                                       : "; choose another --host or port"));
}

}  // namespace lockstep
