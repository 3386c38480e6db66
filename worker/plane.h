// The worker's end of the private plane, without gRPC: a stream of messages to
// and from the coordinator. grpc_plane.h has the real one.
#ifndef LOCKSTEP_WORKER_PLANE_H_
#define LOCKSTEP_WORKER_PLANE_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/worker.pb.h"

namespace lockstep {

class PlaneStream {
 public:
  virtual ~PlaneStream() = default;
  // Blocks; false at the stream's end. One thread.
  virtual bool Read(worker::v1::CoordinatorMessage* message) = 0;
  // Blocks while the coordinator does not read; false once the stream is
  // broken. Any thread.
  virtual bool Write(const worker::v1::WorkerMessage& message) = 0;
  // Write, but nothing if another thread is writing. Any thread.
  virtual void TryWrite(const worker::v1::WorkerMessage& message) = 0;
  // Makes every call return. Any thread.
  virtual void Cancel() = 0;
  // Of this end, numeric: what others on the coordinator's network can reach.
  virtual std::string local_address() const = 0;
  // Why Read returned false, in words. Once, after it did.
  virtual std::string Ending() = 0;
};

class Plane {
 public:
  virtual ~Plane() = default;
  // Blocks until connected, for a few seconds at most, or until `stop` says so.
  // One line says what is wrong with which address. PermissionDenied: never
  // try again.
  virtual absl::StatusOr<std::shared_ptr<PlaneStream>> Dial(const std::function<bool()>& stop) = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_PLANE_H_
