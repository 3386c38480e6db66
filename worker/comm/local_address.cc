#include "worker/comm/local_address.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

struct HostPort {
  std::string host, port;
};

absl::StatusOr<HostPort> Split(const std::string& target) {
  std::string rest = target;
  for (const char* scheme : {"dns:///", "dns:", "ipv4:", "ipv6:"}) {
    if (absl::StartsWith(rest, scheme)) {
      rest = rest.substr(std::strlen(scheme));
      break;
    }
  }
  const size_t colon = rest.rfind(':');
  const size_t bracket = rest.rfind(']');
  const bool has_port =
      colon != std::string::npos && (bracket == std::string::npos || colon > bracket);
  HostPort result{has_port ? rest.substr(0, colon) : rest, has_port ? rest.substr(colon + 1) : "1"};
  if (result.host.size() >= 2 && result.host.front() == '[' && result.host.back() == ']') {
    result.host = result.host.substr(1, result.host.size() - 2);
  }
  if (result.host.empty() || result.port.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("address \"", target, "\": expected HOST:PORT or unix:PATH"));
  }
  return result;
}

absl::StatusOr<std::string> LocalName(const addrinfo& to) {
  const int fd = socket(to.ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::NotFoundError(std::strerror(errno));
  // Connecting a datagram socket picks the route and sends nothing.
  sockaddr_storage local{};
  socklen_t length = sizeof local;
  char name[NI_MAXHOST];
  absl::StatusOr<std::string> result = absl::NotFoundError("no local address");
  if (connect(fd, to.ai_addr, to.ai_addrlen) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&local), &length) != 0) {
    result = absl::NotFoundError(std::strerror(errno));
  } else if (getnameinfo(reinterpret_cast<sockaddr*>(&local), length, name, sizeof name, nullptr, 0,
                         NI_NUMERICHOST) == 0) {
    result = std::string(name);
  }
  close(fd);
  return result;
}

bool IsWildcard(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    return reinterpret_cast<const sockaddr_in&>(address).sin_addr.s_addr == htonl(INADDR_ANY);
  }
  return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6&>(address).sin6_addr);
}

}  // namespace

absl::StatusOr<std::string> LocalAddressTowards(const std::string& target) {
  if (absl::StartsWith(target, "unix:") || absl::StartsWith(target, "unix-abstract:")) {
    return std::string("127.0.0.1");
  }
  absl::StatusOr<HostPort> to = Split(target);
  if (!to.ok()) return to.status();
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int rc = getaddrinfo(to->host.c_str(), to->port.c_str(), &hints, &found);
  if (rc != 0) {
    return absl::NotFoundError(absl::StrCat("address \"", target, "\": ", gai_strerror(rc)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  // IPv4 first: ranks that say "localhost" and "127.0.0.1" must agree.
  absl::Status last = absl::NotFoundError("no address");
  for (const int family : {AF_INET, AF_INET6}) {
    for (const addrinfo* it = found; it != nullptr; it = it->ai_next) {
      if (it->ai_family != family) continue;
      absl::StatusOr<std::string> local = LocalName(*it);
      if (local.ok()) return local;
      last = local.status();
    }
  }
  return absl::NotFoundError(
      absl::StrCat("address \"", target, "\": no route from this host: ", last.message()));
}

absl::StatusOr<sockaddr_storage> ResolveLocalAddress(const std::string& host) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int rc = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (rc != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--comm-address ", host, ": ", gai_strerror(rc)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  for (const addrinfo* it = found; it != nullptr; it = it->ai_next) {
    if (it->ai_family != AF_INET && it->ai_family != AF_INET6) continue;
    sockaddr_storage address{};
    std::memcpy(&address, it->ai_addr, it->ai_addrlen);
    if (IsWildcard(address)) continue;
    const int fd = socket(it->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    const bool bound = bind(fd, it->ai_addr, it->ai_addrlen) == 0;
    close(fd);
    if (bound) return address;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--comm-address ", host,
                   ": not an address of this host that others can reach; name one of its own"));
}

}  // namespace lockstep
