// lockstep.v1.Admin: what operators of this host may ask of a running server, on
// an address of its own that never leaves the host. No API key opens it, and the
// public doors do not offer it.
#ifndef LOCKSTEP_COORDINATOR_API_ADMIN_DOOR_H_
#define LOCKSTEP_COORDINATOR_API_ADMIN_DOOR_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "coordinator/group_watch.h"

namespace lockstep {

class AdminDoor {
 public:
  explicit AdminDoor(GroupWatch* watch);  // outlives the door
  ~AdminDoor();                           // Stop

  // `address`: HOST:PORT of loopback (port 0: any) or unix:PATH, which only this
  // user may then open. One line that names --admin-address when it cannot be had.
  absl::Status Start(const std::string& address);
  // As bound: with the real port.
  const std::string& address() const;
  // Cancels what is asked just now.
  void Stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_ADMIN_DOOR_H_
