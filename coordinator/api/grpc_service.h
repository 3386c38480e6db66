// lockstep.v1.Inference over the request path. One object serves every call.
#ifndef LOCKSTEP_COORDINATOR_API_GRPC_SERVICE_H_
#define LOCKSTEP_COORDINATOR_API_GRPC_SERVICE_H_

#include <memory>

#include "coordinator/api/api_keys.h"
#include "coordinator/api/request_path.h"

namespace grpc {
class Service;
}

namespace lockstep {

// Both outlive every call. With `keys` each call needs one.
std::unique_ptr<grpc::Service> MakeInferenceService(RequestPath* path, ApiKeys* keys);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_GRPC_SERVICE_H_
