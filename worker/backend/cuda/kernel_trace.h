// What the GPU ran, and when: CUPTI's activity records of kernels and copies, also
// of those inside graphs. CUPTI is opened at run time, and only when asked for; while
// nothing is traced it costs nothing.
//
//   auto trace = KernelTrace::Open();       // NotFound where there is no CUPTI
//   (*trace)->Start(); ... steps ...
//   std::vector<KernelRecord> ran = *(*trace)->Stop();
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_KERNEL_TRACE_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_KERNEL_TRACE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lockstep::cuda {

struct KernelRecord {
  std::string name;                   // demangled as far as the first template argument list
  uint64_t begin_ns = 0, end_ns = 0;  // of the host's monotonic clock
  uint32_t stream = 0;
  uint32_t grid = 0, block = 0;  // thread blocks, threads of one
  bool copy = false;             // a copy or a fill, not a kernel
};

// One a process: CUPTI has one set of buffers. Start and Stop from one thread.
class KernelTrace {
 public:
  static absl::StatusOr<std::unique_ptr<KernelTrace>> Open();
  ~KernelTrace();

  absl::Status Start();
  // In order of their beginnings. The caller has waited for what it wants to see.
  absl::StatusOr<std::vector<KernelRecord>> Stop();

 private:
  struct Impl;
  explicit KernelTrace(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_KERNEL_TRACE_H_
