// Unix sockets that gRPC listens on: it removes a file that is in the way, even
// one that another process serves.
#ifndef LOCKSTEP_COMMON_UNIX_SOCKET_H_
#define LOCKSTEP_COMMON_UNIX_SOCKET_H_

#include <string>

#include "absl/status/status.h"

namespace lockstep {

// Whether a server may listen on `address` ("unix:PATH"; any other is fine here):
// AlreadyExists when one does, InvalidArgument for a path of a wrong length.
absl::Status CheckUnixSocketIsFree(const std::string& address);

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_UNIX_SOCKET_H_
