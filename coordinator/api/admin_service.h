// lockstep.v1.Admin: what operators of this host may ask of a running server.
#ifndef LOCKSTEP_COORDINATOR_API_ADMIN_SERVICE_H_
#define LOCKSTEP_COORDINATOR_API_ADMIN_SERVICE_H_

#include <memory>

#include "coordinator/group_watch.h"

namespace grpc {
class Service;
}

namespace lockstep {

// `watch` outlives every call.
std::unique_ptr<grpc::Service> MakeAdminService(GroupWatch* watch);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_ADMIN_SERVICE_H_
