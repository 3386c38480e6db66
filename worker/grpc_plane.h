// The private plane over gRPC: one bidirectional Attach stream.
#ifndef LOCKSTEP_WORKER_GRPC_PLANE_H_
#define LOCKSTEP_WORKER_GRPC_PLANE_H_

#include <memory>
#include <string>

#include "common/tls_files.h"
#include "worker/plane.h"

namespace lockstep {

// coordinator: HOST:PORT, a DNS name included, or unix:PATH. Names are resolved
// anew at every Dial, and the files of `tls` are read again. Without them or
// `insecure`, an address beyond this host is refused: others could read along.
std::unique_ptr<Plane> MakeGrpcPlane(const std::string& coordinator, bool insecure,
                                     const TlsFiles& tls = {});

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_GRPC_PLANE_H_
