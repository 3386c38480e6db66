// The collectives of one group and epoch over NCCL: messages above the reach of
// the own kernels (kernels/all_reduce.h), and groups whose GPUs cannot reach each
// other's memory. Buffers are device memory; a call enqueues and returns.
//
//   auto nccl = NcclCommunicator::Create({.id = "g0/e7", .rank = 1, .size = 2}, device);
//   RETURN_IF_ERROR((*nccl)->Join(exchange));   // blocks until every rank is there
//   (*nccl)->AllReduceSum(Type::kBF16, x, x, count, stream);
//
// Every rank makes the same calls in the same order. Calls may be captured in
// CUDA graphs; destroy those before the communicator. One thread calls, except
// Abort. No collective is run to end it: the destructor aborts. NCCL may hang in
// that: Released says whether it is over, and if not, the process should end.
//
// What NCCL notices of a lost peer inside a host is nothing: who waits on a
// stream bounds that wait and calls Abort.
#ifndef LOCKSTEP_WORKER_COMM_CUDA_NCCL_COMMUNICATOR_H_
#define LOCKSTEP_WORKER_COMM_CUDA_NCCL_COMMUNICATOR_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/types.h"
#include "worker/comm/cuda/nccl_library.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class NcclCommunicator {
 public:
  static constexpr std::chrono::milliseconds kAbortBound{2'000};
  // Multiprocessors that a collective takes at most: others compute meanwhile.
  static constexpr int kMaxBlocks = 16;

  // Opens NCCL. bind_address is not used: NCCL finds its own way.
  static absl::StatusOr<std::unique_ptr<NcclCommunicator>> Create(
      const CommunicatorOptions& options, int device);
  // Aborts, and waits for that up to kAbortBound.
  ~NcclCommunicator();

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  const std::string& version() const { return nccl_->version; }

  // Once. DeadlineExceeded after max_skew_ms (at least a minute), Aborted soon
  // after Abort from another thread; the caller also cancels the exchange.
  absl::Status Join(AddressExchange& exchange);

  // out [count] = the sum over ranks; in place where out == in. Not in the order
  // of ranks, and for a 16-bit type rounded on the way.
  absl::Status AllReduceSum(kernels::Type type, const void* in, void* out, size_t count,
                            cudaStream_t stream);
  // out [size][bytes], in rank order.
  absl::Status AllGather(const void* in, void* out, size_t bytes, cudaStream_t stream);
  absl::Status Broadcast(void* data, size_t bytes, int root, cudaStream_t stream);
  // An error that came up after the calls had returned.
  absl::Status Check();

  // Collectives enqueued or captured so far; the same on every rank.
  uint64_t enqueued() const { return enqueued_; }

  // From any thread, returns at once: kernels that wait for a peer end, Join and
  // all later calls fail.
  void Abort();
  // After Abort: whether NCCL let go within `bound`.
  bool Released(std::chrono::milliseconds bound);

 private:
  struct State;

  NcclCommunicator(const CommunicatorOptions& options, int device, const NcclLibrary* nccl);
  std::unique_lock<std::mutex> LockCalls();
  template <typename Call>
  absl::Status Enqueue(const char* what, Call call);
  // Waits for NCCL to be done with what a call began. The state's mutex is held.
  absl::Status Settle(const char* what, ncclResult_t result,
                      std::chrono::steady_clock::time_point deadline);
  absl::Status Error(const char* what, ncclResult_t result) const;

  const CommunicatorOptions options_;
  const int device_;
  const NcclLibrary* const nccl_;
  const std::shared_ptr<State> state_;  // shared with the thread that aborts
  uint64_t enqueued_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_CUDA_NCCL_COMMUNICATOR_H_
