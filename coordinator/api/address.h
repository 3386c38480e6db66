// Host and port as flags give them.
#ifndef LOCKSTEP_COORDINATOR_API_ADDRESS_H_
#define LOCKSTEP_COORDINATOR_API_ADDRESS_H_

#include <arpa/inet.h>

#include <string>

#include "absl/status/status.h"

namespace lockstep {

// "127.0.0.1:8000", "[::1]:8000".
std::string HostPort(const std::string& host, int port);

// Whether nothing but this machine can reach `host`: localhost, 127/8, ::1. A name
// that begins with 127. may resolve to anything.
inline bool IsLoopback(const std::string& host) {
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  return host == "localhost" || host == "::1";
}

// One line that names the flag when `host`:`port` cannot be bound: taken, not
// allowed, no such address. Port 0 is always free.
absl::Status CheckCanBind(const std::string& host, int port, const char* flag);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_ADDRESS_H_
