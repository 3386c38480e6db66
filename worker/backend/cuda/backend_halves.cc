// A long step over several ranks, its rows in two halves: while one half's sum is
// made by all ranks, the other half's products run.
//
//   stream_           | QKV..O 0 | QKV..O 1 | up, down 0 | up, down 1 | QKV..O 0 | ...
//   exchange_stream_             | sum 0    | sum 1      | sum 0      | sum 1    | ...
//
// The operations between two reductions are kept (stage_) and run for each half in
// turn, so that the order of a half's rows, and of a sequence's positions, is that
// of the whole: the second half's attention finds the first half's keys. The ranks
// cut alike, since they cut by the plan alone.
#include "worker/backend/cuda/backend_impl.h"
#include "worker/comm/cuda/nccl_communicator.h"

namespace lockstep::cuda {
namespace {

// With fewer the halves' products leave much of the device idle.
constexpr int kLeastRows = 2'048;
// Of what a row multiplies in a layer for every element that it sums. Products that
// take so much longer than the sums leave them no multiprocessors: a sum begins when
// some block of theirs ends (70B at tp 2, 6,144 tokens: 735 ms instead of 761).
constexpr int64_t kProductsWithoutCare = 20'000;

}  // namespace

absl::Status CudaBackend::PrepareHalves() {
  int device = 0, least = 0, greatest = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithPriority(&exchange_stream_, cudaStreamNonBlocking, greatest);
  }
  for (cudaEvent_t* event : {&produced_[0], &produced_[1], &reduced_[0], &reduced_[1]}) {
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  }
  return ToStatus(error, "a stream of all-reduces");
}

int CudaBackend::ProductsMultiprocessors() const {
  const int64_t products = int64_t{qkv_width_} + q_width_ + up_width_ + intermediate_;
  return products < kProductsWithoutCare ? multiprocessors_ - NcclCommunicator::kMaxBlocks : 0;
}

bool CudaBackend::MayHalve(int rows, int decode_rows) const {
  return collectives_.size() > 1 && rows >= kLeastRows && decode_rows <= rows / 2;
}

void CudaBackend::RunHalves(const ReduceOp& op) {
  for (int half = 0; half < 2 && status_.ok(); ++half) {
    part_ = halves_[half];
    Check(cudaStreamWaitEvent(stream_, reduced_[half], 0), "waiting for a half's sum");
    for (const std::function<void()>& operation : stage_) {
      if (status_.ok()) operation();
    }
    Check(cudaEventRecord(produced_[half], stream_), "a half's products");
    Check(cudaStreamWaitEvent(exchange_stream_, produced_[half], 0), "a half's products");
    if (status_.ok()) Reduce({.stream = exchange_stream_, .pdl = false}, op);
    Check(cudaEventRecord(reduced_[half], exchange_stream_), "a half's sum");
  }
  stage_.clear();
}

void CudaBackend::JoinHalves() {
  for (cudaEvent_t event : reduced_) {
    Check(cudaStreamWaitEvent(stream_, event, 0), "waiting for a half's sum");
  }
  halved_ = false;
  stage_.clear();
  part_ = {.first = 0, .rows = rows_};
}

}  // namespace lockstep::cuda
