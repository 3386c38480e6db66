// The collectives of the cuda backend: by the GPUs' own writes and copies into each
// other's memory, or, where that is out of reach, by NCCL. With one rank there is nothing to do.
//
// Enqueued on a stream, capturable; every rank makes the same calls.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_COLLECTIVES_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_COLLECTIVES_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/all_reduce.h"
#include "kernels/gemv.h"
#include "kernels/row_exchange.h"
#include "kernels/types.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/backend/cuda/shared_rows.h"
#include "worker/comm/communicator.h"

namespace lockstep {
class DeviceCommunicator;  // worker/comm/cuda/device_communicator.h
}

namespace lockstep::cuda {

class Collectives {
 public:
  // `comm`: of any size; above 1 it must be a DeviceCommunicator, which outlives
  // the epoch.
  // The ranks' waits for each other are added to `clock`, of this device's memory.
  absl::Status Attach(Communicator* comm, int hidden, const SharedRows& shared,
                      kernels::CollectiveClock* clock);
  int size() const { return size_; }
  bool has_peers() const;
  bool shares_gpu() const;  // with other ranks
  bool given_up() const;    // the group: nothing of this epoch will be used
  bool may_skip() const;    // in tests: an all-reduce may be left out, so each is asked for anew

  // *fused: all that args asks for was done. Otherwise only the sum was made, in
  // place of args.in.
  absl::Status AllReduce(const kernels::Launch& launch, const kernels::AllReduceArgs& args,
                         bool* fused);
  // The sum alone, in place of args.in, by NCCL on few multiprocessors: for a long message
  // beside other kernels, where there are no peers.
  absl::Status AllReduceAside(const kernels::Launch& launch, const kernels::AllReduceArgs& args);
  // Whether a long message may go by rows that are dealt out: see kernels/row_exchange.h.
  bool deals_rows() const { return row_exchange_.peers.size > 1; }
  // The sum of the rows that are this rank's, in place; then what was made of them, in the
  // ranks' shared rows, to all others. One behind the other, on one stream.
  absl::Status SumOwnRows(cudaStream_t stream, kernels::Type type, int rows, int hidden,
                          void* data);
  kernels::RowShare OwnRows(int rows) const;
  absl::Status GatherRows(cudaStream_t stream, absl::Span<const kernels::GatheredRows> arrays,
                          int rows);
  // A step's rows by kernels/row_reduce.h. False: it does not take them.
  bool TakesRows(const kernels::RowReduceArgs& args) const {
    return RowReduceTakes(args, row_reduce_);
  }
  absl::Status ReduceRows(const kernels::Launch& launch, const kernels::RowReduceArgs& args);
  // The own ones; offsets as in SharedRows.
  std::byte* shared(size_t offset) const;
  // bytes of `send` from every rank, in rank order.
  absl::Status AllGather(const kernels::Launch& launch, const void* send, void* gathered,
                         size_t bytes);
  // What push and reduce of kernels/gemv.h need; null without peers.
  const kernels::GemvExchange* gemv_exchange() const {
    return has_peers() ? &gemv_exchange_ : nullptr;
  }
  // Where a product may leave the rows of the all-reduce after it; of size 0: nowhere.
  kernels::ExchangePush push_for(const kernels::AllReduceArgs& next) const;
  // Names the rank that a failed step waited for, if one did.
  absl::Status Explain(const absl::Status& failure) const;

  // Since the last ResetStats: as enqueued, so also while a graph is captured.
  void Count(size_t bytes);
  CollectiveStats stats() const { return stats_; }
  void ResetStats() { stats_ = {}; }

 private:
  // end: which mark says that it has.
  absl::Status SumByNccl(const kernels::Launch& launch, const kernels::AllReduceArgs& args,
                         kernels::TransferMark end);

  int size_ = 1;
  DeviceCommunicator* comm_ = nullptr;
  kernels::CollectiveClock* clock_ = nullptr;
  kernels::Peers peers_;  // if has_peers()
  kernels::GemvExchange gemv_exchange_;
  kernels::RowExchange row_exchange_;  // of peers' size 1: none
  kernels::RowReduce row_reduce_;      // of max_rows 0: none
  Buffer<uint64_t> row_reduce_count_;
  uint32_t row_exchange_number_ = 1;
  bool leaves_out_ = false;  // the exchange under way, in tests
  CollectiveStats stats_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_COLLECTIVES_H_
