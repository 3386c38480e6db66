// The local address from which a remote one is reached: what a worker offers
// the other ranks, so that hosts find each other with nothing but the
// coordinator's address.
#ifndef LOCKSTEP_WORKER_COMM_LOCAL_ADDRESS_H_
#define LOCKSTEP_WORKER_COMM_LOCAL_ADDRESS_H_

#include <sys/socket.h>

#include <string>

#include "absl/status/statusor.h"

namespace lockstep {

// target: "host:port", "[v6]:port", "dns:///host:port", "ipv4:..." or
// "unix:...". The numeric local address of the route to it; 127.0.0.1 for a
// unix socket. Sends nothing. NotFound: the name does not resolve or nothing
// leads there.
absl::StatusOr<std::string> LocalAddressTowards(const std::string& target);

// `host`, numeric or a name, as something that this host can bind and others can
// dial; port 0. InvalidArgument when it is not an address of this host, or any.
absl::StatusOr<sockaddr_storage> ResolveLocalAddress(const std::string& host);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_LOCAL_ADDRESS_H_
