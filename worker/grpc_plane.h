// The private plane over gRPC: one bidirectional Attach stream.
#ifndef LOCKSTEP_WORKER_GRPC_PLANE_H_
#define LOCKSTEP_WORKER_GRPC_PLANE_H_

#include <memory>
#include <string>

#include "worker/plane.h"

namespace lockstep {

// coordinator: HOST:PORT, a DNS name included, or unix:PATH. Names are resolved
// anew at every Dial. Without `insecure`, an address beyond this host is
// refused: the plane is not encrypted.
std::unique_ptr<Plane> MakeGrpcPlane(const std::string& coordinator, bool insecure);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_GRPC_PLANE_H_
