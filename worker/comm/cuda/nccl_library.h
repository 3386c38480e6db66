// NCCL, opened when first wanted: a worker starts, and serves on one GPU, where
// it is not installed. Only the functions that nccl_communicator.cc calls.
#ifndef LOCKSTEP_WORKER_COMM_CUDA_NCCL_LIBRARY_H_
#define LOCKSTEP_WORKER_COMM_CUDA_NCCL_LIBRARY_H_

#include <nccl.h>

#include <string>

#include "absl/status/statusor.h"

namespace lockstep {

struct NcclLibrary {
  decltype(&::ncclGetVersion) GetVersion = nullptr;
  decltype(&::ncclGetUniqueId) GetUniqueId = nullptr;
  decltype(&::ncclCommInitRankConfig) CommInitRankConfig = nullptr;
  decltype(&::ncclCommGetAsyncError) CommGetAsyncError = nullptr;
  decltype(&::ncclCommAbort) CommAbort = nullptr;
  decltype(&::ncclGetErrorString) GetErrorString = nullptr;
  decltype(&::ncclGetLastError) GetLastError = nullptr;
  decltype(&::ncclAllReduce) AllReduce = nullptr;
  decltype(&::ncclAllGather) AllGather = nullptr;
  decltype(&::ncclBroadcast) Broadcast = nullptr;
  std::string version;  // "NCCL 2.28.3"

  // Opened once, kept for the life of the process. Sets what NCCL reads from the
  // environment (multicast off: a crash while it is in use can disable a host's
  // GPUs; connections made when joining, not within the first collective, which
  // may be inside a graph capture), so call it before threads that read it.
  // NotFound: not installed; FailedPrecondition: too old. Thread-safe.
  static absl::StatusOr<const NcclLibrary*> Open();
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_CUDA_NCCL_LIBRARY_H_
