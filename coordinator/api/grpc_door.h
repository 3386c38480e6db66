// The gRPC server: lockstep.v1.Inference, grpc.health.v1.Health, and reflection
// by flag. With keys every call of Inference needs `authorization: Bearer KEY` in
// its metadata. No gRPC header leaks from here.
#ifndef LOCKSTEP_COORDINATOR_API_GRPC_DOOR_H_
#define LOCKSTEP_COORDINATOR_API_GRPC_DOOR_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/tls_files.h"
#include "coordinator/api/api_keys.h"
#include "coordinator/api/limits.h"
#include "coordinator/api/request_path.h"

namespace lockstep {

// HTTP/2 pings, in both directions. The defaults are the table's; tests shorten them.
struct GrpcPings {
  int interval_ms = limits::kGrpcPingSeconds * 1000;
  int timeout_ms = limits::kGrpcAnswerSeconds * 1000;
  int client_interval_ms = limits::kGrpcClientPingSeconds * 1000;
};

class GrpcDoor {
 public:
  // Both pointers outlive the door; without `keys` everybody may ask.
  GrpcDoor(RequestPath* path, ApiKeys* keys, GrpcPings pings = {});
  ~GrpcDoor();  // Stop(0)

  // port 0 picks one. Unavailable, one line, when the address cannot be had.
  absl::Status Start(const std::string& host, int port, const TlsFiles& tls, bool reflection);
  int port() const;
  // What health checks answer, for "" and for lockstep.v1.Inference. Thread-safe.
  void SetServing(bool serving);
  // Refuses new calls, waits at most grace_ms for open ones, then cancels them.
  void Stop(int64_t grace_ms);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_GRPC_DOOR_H_
