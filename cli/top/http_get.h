// One GET over a connection of its own, for a command that asks once a second.
#ifndef LOCKSTEP_CLI_TOP_HTTP_GET_H_
#define LOCKSTEP_CLI_TOP_HTTP_GET_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "cli/server_access.h"

namespace lockstep {

// The body of a 200 answer. address: host:port; [::1]:port for IPv6.
// Unavailable: no connection, no answer in time or another status, in one line.
absl::StatusOr<std::string> HttpGet(const std::string& address, const ServerAccess& access,
                                    const std::string& path, int64_t timeout_ms);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_TOP_HTTP_GET_H_
