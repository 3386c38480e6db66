// How a communicator comes to be: it is made for one (rank, size, epoch), joined
// over an AddressExchange, used, and dropped with its epoch. gloo implements it
// for the cpu backend.
//
//   auto comm = MakeGlooCommunicator({.id = "g0/e7", .rank = 1, .size = 2, ...});
//   RETURN_IF_ERROR(comm->Join(exchange));   // blocks until every rank is there
//   comm->AllReduceSum(values);
#ifndef LOCKSTEP_WORKER_COMM_RANK_COMMUNICATOR_H_
#define LOCKSTEP_WORKER_COMM_RANK_COMMUNICATOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/comm/communicator.h"

namespace lockstep {

// A bounded key/value exchange among the ranks of one epoch. Thread-safe.
class AddressExchange {
 public:
  virtual ~AddressExchange() = default;
  // Visible to every other rank, sooner or later. A key is published once.
  virtual absl::Status Publish(const std::string& key, const std::string& value) = 0;
  // Blocks until another rank has published `key`. Aborted after Cancel.
  virtual absl::StatusOr<std::string> Await(const std::string& key) = 0;
  // From any thread: every Await, under way or later, fails.
  virtual void Cancel() = 0;
};

struct CommunicatorOptions {
  std::string id;  // the same on every rank, unique per epoch, at most 240 bytes
  int rank = 0;
  int size = 1;
  std::string bind_address;  // local address or name that the other ranks can reach
  int64_t max_skew_ms = 0;   // a collective that waits longer for a rank fails; 0: 30,000
  // Of device memory that every rank may write, where GPUs reach each other: what the backend
  // shares beside the collectives' own; the same on every rank.
  uint64_t shared_bytes = 0;
  // Of tests alone (worker/fault_injection.h), for GPUs. `skips` is asked before each
  // all-reduce, which this rank leaves out if so (then steps are not replayed, which would
  // not ask); nccl_only: as if no GPU could reach another's memory.
  std::function<bool()> skips = nullptr;
  bool nccl_only = false;
};

// Abort returns soon, whatever the peers do: the session calls it from the
// threads that watch.
class RankCommunicator : public Communicator {
 public:
  // Once, before any collective. Fails soon after Abort from another thread;
  // the caller also cancels the exchange.
  virtual absl::Status Join(AddressExchange& exchange) = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_RANK_COMMUNICATOR_H_
