// The communicator of one rank on a GPU, for one group and epoch: where the GPUs can
// reach each other's memory, the regions of the own kernels; else NCCL.
//
// Not both: NCCL takes half a second to join, memory, and longer to let go of a
// peer that is lost than a worker waits before it ends its process.
//
//   region   [all-reduce and small all-gather | folded all-reduce of kernels/gemv.h |
//             what the backend shares: kernels/row_exchange.h]
//
// Join blocks until every rank is there. The collectives themselves are enqueued
// by worker/backend/cuda/collectives.h; those on host memory, which the base class
// has, are refused here.
#ifndef LOCKSTEP_WORKER_COMM_CUDA_DEVICE_COMMUNICATOR_H_
#define LOCKSTEP_WORKER_COMM_CUDA_DEVICE_COMMUNICATOR_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "kernels/all_reduce.h"
#include "worker/comm/cuda/nccl_communicator.h"
#include "worker/comm/cuda/peer_memory.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class DeviceCommunicator final : public RankCommunicator {
 public:
  // The widest row that the folded all-reduce has room for.
  static constexpr int kMaxGemvWidth = 16'384;

  DeviceCommunicator(const CommunicatorOptions& options, int device);
  ~DeviceCommunicator() override;

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  absl::Status Join(AddressExchange& exchange) override;
  void Abort() override;
  bool aborted() const;
  DeviceCommunicator* device() override { return this; }
  std::string library() const override {
    return peers_ ? "peer memory" : nccl_ ? nccl_->version() : "";
  }
  // The own region, or what joining NCCL took of the device: it may take more when
  // its first collective runs.
  std::optional<uint64_t> buffer_bytes() const override { return buffer_bytes_; }

  // Null where the GPUs cannot reach each other, and with one rank.
  const kernels::Peers* peers() const { return peers_ ? &peers_->peers() : nullptr; }
  // Whether ranks of the group are on this one's GPU.
  bool shares_gpu() const { return peers_ && peers_->shares_device(); }
  const kernels::ExchangeLayout& layout() const { return layout_; }
  size_t gemv_offset() const { return gemv_offset_; }
  // Of options.shared_bytes, if those are not 0; begins with a cleared RowExchange, the rest all
  // ones.
  size_t shared_offset() const { return shared_offset_; }
  size_t shared_bytes() const { return options_.shared_bytes; }
  // After Join: null with one rank, and where there are peers.
  NcclCommunicator* nccl() { return nccl_.get(); }
  // Which rank a kernel waited for in vain; OK if none did.
  absl::Status Fault() const { return peers_ ? peers_->Fault() : absl::OkStatus(); }

  bool MaySkip() const { return options_.skips != nullptr; }
  // Whether this rank leaves out the all-reduce that it is about to enqueue.
  bool Skips() const { return MaySkip() && options_.skips(); }

  absl::Status AllReduceSum(absl::Span<float>) override { return OnHost(); }
  absl::Status Gather(absl::Span<const float>, absl::Span<float>, int) override { return OnHost(); }
  absl::Status Broadcast(absl::Span<std::byte>, int) override { return OnHost(); }
  absl::Status Barrier() override { return OnHost(); }

 private:
  absl::Status JoinNccl(AddressExchange& exchange);
  static absl::Status OnHost() {
    return absl::UnimplementedError("a GPU's communicator has no collectives on host memory");
  }

  const CommunicatorOptions options_;
  const int device_;
  kernels::ExchangeLayout layout_;
  size_t gemv_offset_ = 0, shared_offset_ = 0;
  mutable std::mutex mutex_;  // nccl_ and peers_ appear while another thread may abort
  bool aborted_ = false;
  std::unique_ptr<NcclCommunicator> nccl_;
  std::unique_ptr<PeerMemory> peers_;
  std::optional<uint64_t> buffer_bytes_;  // once joined
};

// "NCCL 2.28.3", or why there is none.
std::string DeviceCollectiveLibrary();

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_CUDA_DEVICE_COMMUNICATOR_H_
