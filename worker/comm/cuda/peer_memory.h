// The exchange regions of a group whose ranks are processes on one host: each
// rank allocates its own, and maps the others' through CUDA IPC. What lies in a
// region is the kernels' affair (kernels/all_reduce.h, kernels/gemv.h).
//
//   auto peers = PeerMemory::Join({.rank = 1, .size = 2, .device = 0, .bytes = n},
//                                 [](std::byte* own, cudaStream_t stream) {
//                                   return ClearExchangeRegion(layout, 2, own, stream);
//                                 }, exchange);
//   if (absl::IsUnimplemented(peers.status())) ...  // NCCL carries everything
//
// All ranks get a region or none does: after mapping, each says whether it could,
// and Join returns when all have said so, every region cleared.
//
// Destroy it once no kernel of this process uses it. The others' regions are let
// go of at once, one's own when a later Join has heard from every rank (which by
// then has let go too), or with the process. No collective is needed for that.
#ifndef LOCKSTEP_WORKER_COMM_CUDA_PEER_MEMORY_H_
#define LOCKSTEP_WORKER_COMM_CUDA_PEER_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/peers.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class PeerMemory {
 public:
  struct Options {
    int rank = 0;
    int size = 1;
    int device = 0;
    size_t bytes = 0;  // the same on every rank
  };
  // Makes one's own fresh region ready: enqueues, does not wait.
  using Clear = std::function<cudaError_t(std::byte* own, cudaStream_t stream)>;

  // Blocks for the other ranks (Aborted once the exchange is cancelled).
  // Unimplemented, on every rank and with the first reason there is: more than
  // kMaxPeers ranks, several hosts, GPUs or containers out of each other's reach.
  // ResourceExhausted, on that rank: there is no memory for the region, and no earlier epoch's to
  // come free.
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Join(const Options& options,
                                                          const Clear& clear,
                                                          AddressExchange& exchange);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Valid as long as this object.
  const kernels::Peers& peers() const { return peers_; }
  // Whether another rank's memory is of this one's GPU: they take turns on it.
  bool shares_device() const { return shares_device_; }

  // From any thread, at once: kernels that wait for a peer stop waiting and end, and
  // so does every later one. What they compute is worthless, the context is not.
  void Abort();

  // After a kernel has trapped: Unavailable, naming the rank that did not come;
  // OK if no kernel waited in vain. Readable although the context is lost.
  absl::Status Fault() const;

 private:
  explicit PeerMemory(const Options& options) : options_(options) {}
  absl::Status Allocate(const Clear& clear);
  absl::Status Shortage(size_t bytes) const;
  // "" or why rank `peer`'s region cannot be mapped.
  std::string Map(int peer, const std::string& offer);

  struct Mailbox;  // mapped host memory

  const Options options_;
  Mailbox* mailbox_ = nullptr;
  kernels::Peers peers_;
  bool mapped_[kernels::kMaxPeers] = {};
  bool shares_device_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_CUDA_PEER_MEMORY_H_
