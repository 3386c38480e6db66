#include "common/unix_socket.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace lockstep {
namespace {

bool IsServed(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool served =
      connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  close(fd);
  return served;
}

}  // namespace

absl::Status CheckUnixSocketIsFree(const std::string& address) {
  if (!absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const std::string path(absl::StripPrefix(address, "unix:"));
  if (path.empty() || path.size() >= sizeof(sockaddr_un{}.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(address, ": a unix socket path has 1 to ",
                                                   sizeof(sockaddr_un{}.sun_path) - 1,
                                                   " characters"));
  }
  if (IsServed(path)) {
    return absl::AlreadyExistsError(absl::StrCat(address, " is in use by another process"));
  }
  return absl::OkStatus();
}

}  // namespace lockstep
