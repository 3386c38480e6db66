// A rank's connections to every other rank of its group: made once over an
// AddressExchange, then used link by link, then broken for good.
//
// Each rank listens on one port a peer, on the address it offers. Who connects
// must greet with the group's name and its rank; the first connection to a port
// is the only one.
#ifndef LOCKSTEP_WORKER_COMM_GLOO_MESH_H_
#define LOCKSTEP_WORKER_COMM_GLOO_MESH_H_

#include <gloo/transport/context.h>
#include <gloo/transport/device.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/comm/gloo_link.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class GlooMesh {
 public:
  // 1 <= size <= 256. Bounds a connection and every later wait by max_skew_ms.
  explicit GlooMesh(const CommunicatorOptions& options);
  ~GlooMesh() { Break(); }

  // Once. Errors name the peer.
  absl::Status Join(AddressExchange& exchange);

  // After Join. rank: not one's own.
  GlooLink& link(int rank) { return *links_[rank]; }

  // Any thread: whatever uses a link throws, here and at the peers.
  void Break();
  // As Break, and on purpose.
  void Abort();
  bool aborted() const { return aborted_; }

  // What gloo says, without the place in its sources.
  static std::string Words(const std::exception& e);

 private:
  absl::Status CreateLinks();
  absl::Status Connect(AddressExchange& exchange);
  absl::Status Greet();
  absl::Status Error(absl::StatusCode code, const std::string& what) const;

  const CommunicatorOptions options_;
  std::shared_ptr<gloo::transport::Device> device_;
  std::shared_ptr<gloo::transport::Context> context_;
  std::mutex mutex_;                              // guards the creation of links_ against Break
  std::vector<std::unique_ptr<GlooLink>> links_;  // by rank; null for one's own
  std::atomic<bool> aborted_{false};
  int peer_ = -1;  // who is being spoken to
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_GLOO_MESH_H_
