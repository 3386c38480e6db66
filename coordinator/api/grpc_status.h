// Our statuses as gRPC clients read them.
#ifndef LOCKSTEP_COORDINATOR_API_GRPC_STATUS_H_
#define LOCKSTEP_COORDINATOR_API_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace grpc {
class CallbackServerContext;
}

namespace lockstep {

// RESOURCE_EXHAUSTED gets google.rpc.RetryInfo in its details and the trailer
// grpc-retry-pushback-ms in `context`, with the delay that the refuser named.
grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_GRPC_STATUS_H_
