// The collectives of one group and epoch. Every rank makes the same calls in
// the same order. Counted and timed: what a rank waits for the last peer to
// arrive (skew) apart from the transfer.
//
// Calls come from one thread (the executor's), except Abort and stats-free
// destruction. After any error the communicator is dead: every call fails.
#ifndef LOCKSTEP_WORKER_COMM_COMMUNICATOR_H_
#define LOCKSTEP_WORKER_COMM_COMMUNICATOR_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace lockstep {

struct CollectiveStats {  // since the last ResetStats
  uint32_t count = 0;
  uint64_t wait_ns = 0;
  uint64_t transfer_ns = 0;
  uint64_t aside_ns = 0;  // of transfers behind the step's other work
  uint64_t bytes_sent = 0;
};

class DeviceCommunicator;  // worker/comm/cuda/device_communicator.h

class Communicator {
 public:
  virtual ~Communicator() = default;
  // The collectives of device memory, of a group of GPUs; null in any other.
  virtual DeviceCommunicator* device() { return nullptr; }
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // By what, once joined; empty: by what its worker says.
  virtual std::string library() const { return ""; }
  // Memory that it holds for its transfers, once joined; nothing where it cannot tell.
  virtual std::optional<uint64_t> buffer_bytes() const { return std::nullopt; }

  // In place sum over ranks, added as a binary tree over rank order
  // ((0+1)+(2+3))+..., so that it equals the same tree formed on fewer ranks,
  // bit for bit, and is the same on every rank. size() not a power of two: the
  // tree of the next power of two, with the missing leaves left out.
  virtual absl::Status AllReduceSum(absl::Span<float> values) = 0;
  // On `root`, `all` becomes the ranks' `mine` concatenated in rank order;
  // elsewhere `all` may be empty. Every rank passes the same mine.size().
  virtual absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) = 0;
  virtual absl::Status Broadcast(absl::Span<std::byte> data, int root) = 0;
  virtual absl::Status Barrier() = 0;

  // From any thread: makes the call under way, and all later ones, fail soon.
  virtual void Abort() = 0;

  CollectiveStats stats() const { return stats_; }
  void ResetStats() { stats_ = {}; }

 protected:
  CollectiveStats stats_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_COMMUNICATOR_H_
